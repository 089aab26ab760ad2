"""Files of converted models: a second process starts from what the first one has converted.

A file is named by a hash of all that the model depends on: function, weights, structure, shapes, precision, processor,
threads, and the versions of every library that takes part.  It is written as a whole or not at all, and its content is
checked before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import write_whole
from ..ops import _local
from . import conversion
from .nests import decode, encode

#: Begins every file; other layouts have another one.
_MAGIC = b"difffast openvino 1\n"
#: Most bytes of all files together; beyond, those that have not been used for longest are deleted.
_LIMIT = 16 << 30
#: Seconds after which what a killed process has left of a file is deleted.
_ABANDONED = 3600
#: Share of the disk's free space that one file may take.
_SHARE = 0.25
_LIBRARIES = ("difffast", "torch", "diffusers", "transformers", "peft", "openvino")


def find_folder() -> Path:
    """Return the folder of the files; it need not exist."""
    return _local.find_folder().parent / "openvino"


def find_file(function: str, mark: str, structure: Any, tensors: Sequence[Tensor], precision: str) -> Path:
    """Return the file of a model, which need not exist.

    Args:
        function: its name.
        mark: hash of weights and structure.
        structure: of the arguments, without their tensors.
        tensors: the arguments' tensors, of which shapes and dtypes count.
        precision: in which it runs.
    """
    facts = (
        function,
        mark,
        repr(structure),
        [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors],
        precision,
        conversion.describe_processor(),
        [_find_version(name) for name in _LIBRARIES],
        _hash_own_source(),
    )
    return find_folder() / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.model"


def read(file: Path, precision: str, note: Callable[[str], Any]) -> conversion.Model | None:
    """Return the model in a file; None where there is none, or none that can be used."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    try:
        head, body = _split(content)
        model = conversion.load(bytes(body), decode(head["output"]), head["weight_bytes"], precision)
    except Exception as error:  # whatever OpenVINO raises for what it cannot read
        note(f"a converted model was damaged and is made anew: {file.name}: {str(error).strip().partition(chr(10))[0]}")
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    with contextlib.suppress(OSError):
        file.touch()
    return model


def write(file: Path, model: conversion.Model, note: Callable[[str], Any]) -> None:
    """Keep a model in a file, where there is room for it."""
    try:
        body = model.save()
        head = json.dumps({"output": encode(model.output), "weight_bytes": model.weight_bytes}).encode()
        file.parent.mkdir(parents=True, exist_ok=True)
        if len(body) > _SHARE * shutil.disk_usage(file.parent).free:
            note(f"a converted model of {len(body) >> 20} MiB is not kept: the disk has too little space")
            return
        with write_whole(file) as part, part.open("wb") as out:
            checksum = zlib.crc32(body, zlib.crc32(head))
            out.write(_MAGIC + checksum.to_bytes(8, "little") + len(head).to_bytes(8, "little") + head)
            out.write(body)
        _delete_oldest(file.parent)
    except (OSError, RuntimeError, TypeError) as error:
        note(f"a converted model is not kept for other processes: {error}")


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the head and the body of a file.

    Raises:
        ValueError: it is not one of these files, or not all of it is there.
    """
    start = len(_MAGIC) + 16
    if not content.startswith(_MAGIC) or len(content) < start:
        raise ValueError("its beginning is another one")
    checksum, size = (int.from_bytes(content[at : at + 8], "little") for at in (start - 16, start - 8))
    if zlib.crc32(memoryview(content)[start:]) != checksum:
        raise ValueError("its checksum is another one")
    return json.loads(content[start : start + size]), memoryview(content)[start + size :]


def _delete_oldest(folder: Path) -> None:
    """Delete the files that have not been used for longest, beyond the limit, and what killed processes have left."""
    files = sorted(folder.glob("*.model"), key=lambda each: each.stat().st_mtime)
    for each in files:
        if each.name.startswith(".") and time.time() - each.stat().st_mtime > _ABANDONED:
            each.unlink(missing_ok=True)
    files = [each for each in files if not each.name.startswith(".")]
    left = sum(each.stat().st_size for each in files)
    for each in files[:-1]:
        if left <= _LIMIT:
            return
        left -= each.stat().st_size
        each.unlink(missing_ok=True)


def _find_version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} missing"


def _hash_own_source() -> str:
    """Return a hash of this package's sources, which change between releases too."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted((*root.glob("unet/*.py"), *root.glob("layers/*.py"), *root.glob("engines/*.py"))):
        found.update(path.read_bytes())
    return found.hexdigest()
