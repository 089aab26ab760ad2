"""The files of proofs, written: by one process at a time, and replaced as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..ops import _local

#: Sets of proofs that a file keeps: of other versions, settings or environments of the same device.
_SETS = 8

try:
    import fcntl
except ImportError:  # not on Windows: there the last one to write wins
    fcntl = None

_here = threading.Lock()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let no other process write a file inside the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _here, path.with_suffix(".lock").open("a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, change: Callable[[dict[str, Any]], None]) -> str | None:
    """Change the sets of a file; return why that is not possible, or None."""
    written = path.with_suffix(f".{os.getpid()}.part")
    try:
        with _locked(path):
            sets = _local.read_file(path)[0] if path.exists() else {}
            change(sets)
            try:
                written.write_text(json.dumps({"schema": _local.SCHEMA, "sets": sets}, indent=1, sort_keys=True))
                written.replace(path)
            finally:
                written.unlink(missing_ok=True)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}), so that the proofs hold for this process only"
    return None


def merge(device: torch.device, proofs: dict[str, dict[str, Any]]) -> str | None:
    """Add proofs to a device's file and to the table of this process; what others have added meanwhile stays.

    Args:
        proofs: entries by key and mode.

    Returns:
        Why the file cannot be written, or None.
    """
    facts = _local.find_facts(device)
    mark = _local.hash_facts(facts)

    def change(sets: dict[str, Any]) -> None:
        own = sets.pop(mark, {"proofs": {}})
        known = {**own["proofs"], **proofs}
        for other in sorted(sets, key=lambda each: sets[each].get("written", 0))[: max(0, len(sets) + 1 - _SETS)]:
            del sets[other]
        sets[mark] = {"facts": facts, "written": round(time.time()), "proofs": known}

    table = _local.table_of(device)
    note = _write(table.path, change)
    if note is None:
        table.note = None
    table.proofs = {**table.proofs, **proofs}
    _local.change()
    return note


def clear(device: torch.device) -> bool:
    """Delete a device's file; return whether there was one.

    Raises:
        OSError: it cannot be deleted.
    """
    path = _local.find_path(device)
    existed = path.exists()
    path.unlink(missing_ok=True)
    path.with_suffix(".lock").unlink(missing_ok=True)
    _local.forget_tables()
    return existed
