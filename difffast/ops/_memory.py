"""How much memory the process may still take, by the operating system and by the container that it may run in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/proc/meminfo")
#: The control groups that the process is in, as lines like "5:memory:/docker/1234" or, of version 2, "0::/user".
_OWN = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
#: By the controller in these lines: a folder in :data:`_GROUPS`, in that of a group the files of its limit and of what
#: is taken, and how those fields of memory.stat begin that count files' memory, which would be given back.
_FILES = {
    "": (".", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}

#: Memory that is left for pictures on their way and for other processes: so many bytes, at most this share of all.
_RESERVE, _SHARE = 4 << 30, 0.25


def leaves_enough(size: int) -> bool:
    """Return whether enough memory is left for other things when one takes ``size`` bytes."""
    left, whole = count_left(), count_all()
    return left is None or whole is None or left - size >= min(_RESERVE, _SHARE * whole)


def count_left() -> int | None:
    """Return the bytes that can still be taken without swapping or being killed; None: the system does not tell."""
    left = [_read_fields(_SYSTEM).get("MemAvailable:")]
    left += [limit - taken for limit, taken in _read_groups()]
    return min((each for each in left if each is not None), default=None)


def count_all() -> int | None:
    """Return the bytes of memory that the machine or the container has; None: the system does not tell."""
    whole = _read_fields(_SYSTEM).get("MemTotal:")
    if whole is None and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [whole, *(limit for limit, _ in _read_groups())]
    return min((each for each in found if each is not None), default=None)


def _read_groups() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes taken) of the process's group and of those around it, where they have a limit."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        for controller in _FILES.keys() & set(controllers.split(",")):
            folder, limit, taken, prefix = _FILES[controller]
            inner = Path(path.strip("/"))
            for group in (inner, *inner.parents):  # in a container, its own group is what it sees as the outermost
                at = _GROUPS / folder / group
                with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
                    fields = _read_fields(at / "memory.stat")
                    files = sum(fields.get(f"{prefix}{state}_file", 0) for state in ("active", "inactive"))
                    yield int((at / limit).read_text()), int((at / taken).read_text()) - files


def _read_fields(file: Path) -> dict[str, int]:
    """Return the bytes by name of a file of lines like "MemTotal: 1024 kB" or "inactive_file 1024"."""
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, number, *unit = line.split()
            fields[name] = int(number) << (10 if unit == ["kB"] else 0)
    return fields
