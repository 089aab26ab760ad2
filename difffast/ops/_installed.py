"""What this installation has: the compiled extension, Triton, a GPU; which backends are missing, and why.

``reference`` is plain PyTorch and always runs; ``sdpa`` is PyTorch's own fused attention, ``onednn`` its way to that
library's matrix products on CPUs.  ``cpp`` (CPU) and ``cuda`` (NVIDIA) are compiled into ``difffast._C`` by setup.py
through LibTorch's stable ABI; ``triton`` needs a GPU, or TRITON_INTERPRET=1 on a CPU.

Nothing here changes while a process runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os

import torch

from . import _library  # noqa: F401 - schemas come before what implements them

#: The oldest PyTorch with all of the stable ABI that the extension calls; setup.py builds it for no older one.
STABLE_ABI = (2, 10)
#: The oldest Triton with tl.range(disable_licm=True), without which loops would hold too many registers.
_TRITON = (3, 5)
#: How the parts that are compiled come into being; setup.py says the same.
_HOW = "and setuptools>=78.0.1 installed, `pip install -v --no-build-isolation .` in a checkout builds"
NOT_BUILT = f"difffast._C is not built: with a C++ compiler {_HOW} it, or prints why it cannot"

#: PyTorch's own, which need no proof.
FROM_PYTORCH = ("reference", "sdpa", "onednn")
#: PyTorch's fused attention by one of its kernels for GPUs, after torch.nn.attention.SDPBackend; "sdpa" tries them in
#: an order of its own.  They are chosen where a proof has measured that another one is faster.
SDPA_KERNELS = ("flash", "cudnn", "efficient")
BACKENDS = (*FROM_PYTORCH, "cpp", "triton", "cuda", *SDPA_KERNELS)


def _load_extension() -> tuple[ctypes.CDLL | None, str | None]:
    """Load ``difffast._C`` and return it, or the reason why it cannot be loaded."""
    # An older PyTorch may load it all the same, and crashes at its first call.
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < STABLE_ABI:
        oldest = ".".join(map(str, STABLE_ABI))
        return None, f"difffast._C needs torch >= {oldest}, whose ABI is stable, and torch is {torch.__version__}"
    spec = importlib.util.find_spec("difffast._C")
    if spec is None or spec.origin is None:
        return None, NOT_BUILT
    try:
        torch.ops.load_library(spec.origin)
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"{spec.origin} cannot be loaded: {error}"
    library.difffast_instruction_set.restype = ctypes.c_char_p
    return library, None


def _explain_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of a build with another name
        found = importlib.metadata.version("triton")  # the module's own __version__ would import the compiler
        if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
            return f"the kernels need triton >= {'.'.join(map(str, _TRITON))}, torch 2.9's own, and triton is {found}"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device is visible (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    return None


def _explain_cuda() -> str | None:
    if _extension is None:
        return _not_built
    if not _extension.difffast_has_cuda():
        return (
            f"difffast._C was built without the CUDA kernels: with a CUDA toolkit {_HOW} them, or prints why it cannot"
        )
    return None if torch.cuda.is_available() else "no CUDA device is visible"


#: Whether Triton kernels run in Triton's interpreter; Triton reads the variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_extension, _not_built = _load_extension()
_missing: dict[str, str | None] = {
    "reference": None,
    "sdpa": None,
    "onednn": None if torch.backends.mkldnn.is_available() else "PyTorch was built without oneDNN",
    "cpp": _not_built,
    "triton": _explain_triton(),
    "cuda": _explain_cuda(),
    **dict.fromkeys(SDPA_KERNELS, None if torch.cuda.is_available() else "no CUDA device is visible"),
}
#: The instruction set of the C++ kernels, as csrc/cpu/instruction_set.h names them; None without them.
INSTRUCTION_SET: str | None = _extension.difffast_instruction_set().decode() if _extension else None

_DEVICES = {
    "onednn": ("cpu",),
    "cpp": ("cpu",),
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
    "cuda": ("cuda",),
    **dict.fromkeys(SDPA_KERNELS, ("cuda",)),
}


def has_amx() -> bool:
    """Return whether this processor multiplies bfloat16 in tiles, many times as fast as float32, and lets us do so."""
    return INSTRUCTION_SET == "amx"


def missing(backend: str) -> str | None:
    """Say why a backend cannot run in this installation, or return None if it can.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in _missing:
        raise ValueError(f"unknown backend {backend!r}; available: {', '.join(BACKENDS)}")
    return _missing[backend]


def find_obstacle(backend: str, device: torch.device) -> str | None:
    """Say why a backend cannot run on this device in this installation, or return None."""
    reason = missing(backend)
    if reason is None and device.type not in _DEVICES.get(backend, (device.type,)):
        reason = f"it serves {' and '.join(_DEVICES[backend])} tensors, the tensor is on {device.type!r}"
    return reason
