"""The local table: what proofs on this very machine have found, and which backends have failed here.

One JSON file for each device in the user's cache folder.  It holds a set of proofs for each *fingerprint*: all that the
speed and the result of a kernel may depend on, from the driver to the source of the kernels.  :mod:`difffast.proofs`
writes it; here it is read.  Whatever is wrong with a file, there is a note, and PyTorch's operators run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _installed
from ._keys import Key

#: Of the files; another number is another format.
SCHEMA = 1
#: How an operator is called: by Python, or from a captured CUDA graph or a compiled program.
MODES = ("eager", "graph")


class State(NamedTuple):
    """What decisions depend on besides their signature and what is forced; a part of what is remembered.

    Attributes:
        version: of the tables, increased with every change.
        mode: one of :data:`MODES`.
    """

    version: int = 0
    mode: str = "eager"


@dataclass
class Table:
    """The proofs that hold on one device.

    Attributes:
        path: the file.
        threads: of a CPU, whose speed depends on them; else 0.
        proofs: entry by key and mode (:meth:`~difffast.ops._keys.Key.text`); an entry has at least ``choice``.
        note: what is wrong with the file; None: nothing is.
    """

    path: Path
    threads: int = 0
    proofs: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str | None = None


#: A plain global that is only ever replaced.
state = State()
#: Is told of every question while a UNet is run dry, on the meta device.  Nothing is remembered then.
watch: Callable[[torch.device, Key], object] | None = None

_tables: dict[tuple[str, int | None], Table] = {}
_struck: dict[tuple[str, str], str] = {}
#: The modes of blocks that have not ended, in lists of their own: threads may end them in another order.
_modes: list[list[str]] = []
_lock = threading.Lock()


def keep_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a compiled graph keep what ``function`` returned when it was traced.

    It is ``torch.compiler.assume_constant_result``, which does this and imports the compiler: a second of CPU time.
    """
    function._dynamo_marked_constant = True
    return function


def change(**changes: Any) -> None:
    """Replace the state; without arguments by one with a new version."""
    global state
    with _lock:
        state = state._replace(**changes) if changes else state._replace(version=state.version + 1)


@contextlib.contextmanager
def use_mode(mode: str) -> Iterator[None]:
    """Let operators choose for a mode of :data:`MODES` inside a ``with`` block, in all threads of the process.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    block = [mode]
    _change_modes(lambda: _modes.append(block))
    try:
        yield
    finally:
        _change_modes(lambda: _modes.pop(next(i for i, each in enumerate(_modes) if each is block)))


def _change_modes(change_blocks: Callable[[], object]) -> None:
    global state
    with _lock:
        change_blocks()
        state = state._replace(mode=_modes[-1][0] if _modes else MODES[0])


@keep_in_graphs
def load(device: torch.device) -> bool:
    """Read the table of a device, if it has not been read yet; return whether it has proofs."""
    if device.type not in ("cpu", "cuda"):
        return False
    return bool(table_of(device).proofs)


def table_of(device: torch.device) -> Table:
    """Return the table of a device; it is read at the first call.  A file with something wrong gives a warning.

    A CPU's is read anew once it is asked for with another number of threads.  A decision that is remembered does not
    ask; a patch does.
    """
    where = (device.type, device.index)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    table = _tables.get(where)
    if table is None or table.threads != threads:
        path = find_path(device)
        table = Table(path, threads)
        content, table.note = read_file(path)
        mark = hash_facts(find_facts(device)) if content else ""
        table.proofs = content.get(mark, {}).get("proofs", {})
        if content and not table.proofs:
            table.note = f"{path} has no proofs for this installation; `difffast prove` makes them"
        with _lock:
            known = _tables.get(where)
            if known is not None and known.threads == threads:
                return known
            _tables[where] = table
        if table.proofs or known is not None:
            change()
        if table.note is not None and os.environ.get("DIFFFAST_PROVE") != "0":
            warnings.warn(f"difffast: {table.note}", stacklevel=2)
    return table


def forget_tables() -> None:
    """Read the tables anew at their next use; what has been struck out is forgotten as well."""
    with _lock:
        _tables.clear()
        _struck.clear()
    change()


@keep_in_graphs
def find(
    _version: int,
    device: torch.device,
    operator: str,
    dtype: torch.dtype,
    shapes: tuple[Any, ...],
    strides: tuple[Any, ...] | None,
    options: tuple[tuple[str, int], ...],
    mode: str,
) -> str | None:
    """Return the backend that a proof has chosen for a call, or None.

    A compiled graph keeps the answer, and is made anew for another version.
    """
    if any(type(size) is not int for shape in shapes for size in shape):
        return None  # symbols
    try:
        key = Key.of(operator, dtype, shapes, strides, options)
        entry = _tables[device.type, device.index].proofs.get(key.text(mode))
        choice = None if entry is None else entry.get("choice")
    except (KeyError, TypeError, AttributeError):
        return None  # no table, or an entry that nobody here has written
    return choice if isinstance(choice, str) and (operator, choice) not in _struck else None


def are_static(shapes: tuple[Any, ...], strides: tuple[Any, ...] | None, options: tuple[tuple[str, int], ...]) -> bool:
    """Whether all numbers of a case are known while a call is traced; a table can only be asked for those."""
    # It brings in SymPy, which has come in with the tracer.
    from torch.fx.experimental import symbolic_shapes

    if not hasattr(symbolic_shapes, "has_static_value"):  # before torch 2.9
        return False
    for numbers in (*shapes, *(strides or ())):
        for number in numbers:
            if not symbolic_shapes.has_static_value(number):
                return False
    return all([symbolic_shapes.has_static_value(number) for _, number in options])


def describe_choices(device: torch.device, dtype: torch.dtype) -> str:
    """Return, as text, for how many shapes the proofs of a device and dtype have chosen which backends; may be ""."""
    if not load(device):
        return ""
    found: Counter[str] = Counter()
    for text, entry in table_of(device).proofs.items():
        parts = text.split(" ")
        if parts[-1] == state.mode and parts[1:2] == [str(dtype).removeprefix("torch.")]:
            found[f"{parts[0]} ({entry.get('choice')})"] += 1
    return ", ".join(f"{name} for {count} shapes" for name, count in sorted(found.items()))


def has_kernel(device: torch.device, operator: str, dtype: torch.dtype, layout: str = "") -> bool:
    """Return whether a proof has chosen a kernel of ours, for operands that lie so in memory if a layout is named."""
    if not load(device):
        return False
    start = f"{operator} {str(dtype).removeprefix('torch.')} "
    return any(
        key.startswith(start) and layout in key and entry.get("choice") in ("triton", "cuda", "cpp")
        for key, entry in table_of(device).proofs.items()
    )


def strike(operator: str, backend: str, reason: str) -> None:
    """Let a backend that has failed run no more in this process unless it is forced."""
    _struck[operator, backend] = reason
    change()


def acquit(operator: str, backend: str) -> None:
    """Take back a :func:`strike`."""
    _struck.pop((operator, backend), None)
    change()


@keep_in_graphs
def is_struck(_version: int, operator: str, backend: str) -> bool:
    """Whether a backend of an operator has failed in this process."""
    return (operator, backend) in _struck


def list_struck() -> list[tuple[str, str, str]]:
    """Return (operator, backend, reason) of all that has failed in this process."""
    return [(*which, reason) for which, reason in _struck.items()]


def find_folder() -> Path:
    """Return the folder for proofs in the user's cache folder, which the platform says; it need not exist."""
    if "DIFFFAST_CACHE" in os.environ:
        return Path(os.environ["DIFFFAST_CACHE"]) / "proofs"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return base.expanduser() / "difffast" / "proofs"
    except RuntimeError:  # a user without a home: in no file's place is nothing found, and nothing kept
        return Path(os.devnull, "no home folder", "difffast", "proofs")


def find_path(device: torch.device) -> Path:
    """Return the file of a device."""
    return find_folder() / f"{re.sub('[^a-z0-9]+', '-', name_device(device).lower()).strip('-')}.json"


def name_device(device: torch.device) -> str:
    """Return the name of a device; a CPU's speed is that of the threads that it may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {_read_processor()} {torch.get_num_threads()} threads"


@functools.cache
def _read_processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_facts(device: torch.device) -> dict[str, Any]:
    """Return all that a proof may depend on besides its key."""
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "device": name_device(device),
        "torch": torch.__version__,
        "torch git": torch.version.git_version,
        "kernels": _hash_kernels(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
            "driver": _read_driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "triton": _version("triton"),
        }
    else:
        facts |= {"instruction set": _installed.INSTRUCTION_SET, "onednn": torch.backends.mkldnn.enabled}
    return facts


def hash_facts(facts: dict[str, Any]) -> str:
    """Return the fingerprint."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def _hash_kernels() -> str:
    """Return a hash of the source of the Triton kernels, of the compiled extension and of what chooses their tiles."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.find_spec("difffast.triton_kernels")
    folders = [Path(each) for each in (spec.submodule_search_locations or ())] if spec is not None else []
    for path in [*(p for folder in folders for p in sorted(folder.glob("*.py"))), *sorted(package.glob("_C*"))]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _read_driver() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").splitlines()[0]
    with contextlib.suppress(AttributeError, RuntimeError):
        return str(torch._C._cuda_getDriverVersion())
    return "unknown"


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def read_file(path: Path) -> tuple[dict[str, Any], str | None]:
    """Read a file of proofs, which need not exist.

    Returns:
        The set of proofs {"facts": ..., "proofs": ...} by fingerprint, and what is wrong with the file.
    """
    if not os.path.exists(path):  # noqa: PTH110 - which is also false where a folder may not be looked into
        return {}, None
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        return {}, f"{path} cannot be read ({error.strerror}), so that PyTorch's operators run"
    except (ValueError, RecursionError):
        return {}, f"{path} is damaged, so that PyTorch's operators run; `difffast prove` makes it anew"
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        found = f"has schema {schema!r}, and this version reads {SCHEMA}"
        return {}, f"{path} {found}, so that PyTorch's operators run; `difffast prove` makes it anew"
    sets = content.get("sets")
    well = isinstance(sets, dict) and all(
        isinstance(each, dict)
        and isinstance(each.get("proofs"), dict)
        and all(isinstance(entry, dict) for entry in each["proofs"].values())
        for each in sets.values()
    )
    if not well:
        return {}, f"{path} is damaged, so that PyTorch's operators run; `difffast prove` makes it anew"
    return sets, None
