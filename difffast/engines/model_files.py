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

import numpy as np
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
        if not file.is_file():
            return None
        content = np.memmap(file, np.uint8, "c")  # OpenVINO asks for memory that could be written to
        head, start = _read_head(content)
        model = conversion.load(content[start:], decode(head["output"]), head["weight_bytes"], precision)
    except OSError:
        return None
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
        head = json.dumps({"output": encode(model.output), "weight_bytes": model.weight_bytes}).encode()
        file.parent.mkdir(parents=True, exist_ok=True)
        if model.weight_bytes > _SHARE * shutil.disk_usage(file.parent).free:
            note(f"a converted model of {model.weight_bytes >> 20} MiB is not kept: the disk has too little space")
            return
        with write_whole(file) as part:
            with part.open("wb") as out:
                out.write(_MAGIC + bytes(8) + len(head).to_bytes(8, "little") + head)
                model.save(out)
            checksum = zlib.crc32(np.memmap(part, np.uint8, "r")[len(_MAGIC) + 16 :])
            with part.open("r+b") as out:
                out.seek(len(_MAGIC))
                out.write(checksum.to_bytes(8, "little"))
        _delete_oldest(file.parent)
    except (OSError, RuntimeError, TypeError) as error:
        note(f"a converted model is not kept for other processes: {error}")


def _read_head(content: np.ndarray) -> tuple[dict[str, Any], int]:
    """Return the head of a file, and where its body begins.

    Raises:
        ValueError: it is not one of these files, or not all of it is there.
    """
    start = len(_MAGIC) + 16
    fixed = content[:start].tobytes()
    if not fixed.startswith(_MAGIC) or len(fixed) < start:
        raise ValueError("its beginning is another one")
    checksum, size = (int.from_bytes(fixed[at : at + 8], "little") for at in (start - 16, start - 8))
    if zlib.crc32(content[start:]) != checksum:
        raise ValueError("its checksum is another one")
    return json.loads(content[start : start + size].tobytes()), start + size


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
