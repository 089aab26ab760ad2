"""The files of proofs, written: by one process at a time, and replaced as a whole."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import lock_file, write_whole
from ..ops import _local

#: Sets of proofs that a file keeps: of other versions, settings or environments of the same device.
_SETS = 8


def _write(path: Path, change: Callable[[dict[str, Any]], None]) -> str | None:
    """Change the sets of a file; return why that is not possible, or None."""
    try:
        with lock_file(path):
            sets = _local.read_file(path)[0]
            change(sets)
            with write_whole(path) as part:
                part.write_text(json.dumps({"schema": _local.SCHEMA, "sets": sets}, indent=1, sort_keys=True))
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
        for other in sorted(sets, key=lambda each: _read_time(sets[each]))[: max(0, len(sets) + 1 - _SETS)]:
            del sets[other]
        sets[mark] = {"facts": facts, "written": round(time.time()), "proofs": known}

    table = _local.table_of(device)
    note = _write(table.path, change)
    if note is None:
        table.note = None
    table.proofs = {**table.proofs, **proofs}
    _local.change()
    return note


def _read_time(proofs: dict[str, Any]) -> float:
    """Return when a set was written, 0 where somebody else has written something else there."""
    written = proofs.get("written")
    return written if isinstance(written, (int, float)) else 0


def clear(device: torch.device) -> bool:
    """Delete a device's file; return whether there was one.

    Raises:
        OSError: it cannot be deleted.
    """
    path = _local.find_path(device)
    existed = os.path.exists(path)  # noqa: PTH110 - also false where a folder may not be looked into
    if existed:
        with lock_file(path):
            path.unlink(missing_ok=True)
    _local.forget_tables()
    return existed
