"""Proofs: which kernels have passed their operator's tests on which hardware."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._installed import FROM_PYTORCH


@dataclass(frozen=True)
class Proof:
    """One row of the proof table: a run on this hardware passed the tests of the operator.

    Attributes:
        operator: the name of the operator.
        backend: one of :data:`BACKENDS`.
        architecture: ``"cpu"``, or a GPU architecture such as ``"sm_90"``.
        dtypes: the dtypes for which the tests ran.
        run: what ran, and where; the raw record is committed.
    """

    operator: str
    backend: str
    architecture: str
    dtypes: frozenset[torch.dtype]
    run: str


_ON_CPU = "make test on x86-64 with AVX-512, AVX2 and SSE2"

#: For which kernels a run on the hardware has proved them.  A GPU kernel that is not listed is never a default: it runs
#: only when forced.  Add a row with the commit that adds the record of the run.
PROVED: tuple[Proof, ...] = (
    Proof(
        "repeat_batch", "cpp", "cpu", frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64}), _ON_CPU
    ),
    Proof("attention_entropy", "cpp", "cpu", frozenset({torch.float32, torch.float64}), _ON_CPU),
    Proof("cross_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("convolution", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("edited_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("geglu", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("group_norm_silu", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("joint_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("self_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("skip_norm_silu", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
)


def is_proved(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend may be a default: plain PyTorch always, a kernel of ours where a run on the hardware proved it.

    A C++ kernel for the CPU may be a default for every dtype it takes: the tests run on the user's kind of machine.
    """
    if backend in FROM_PYTORCH:
        return True
    rows = [p for p in PROVED if p.operator == operator and p.backend == backend]
    if device.type == "cpu":
        return any(p.architecture == "cpu" for p in rows)
    if not rows or device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return any(p.architecture == f"sm_{major}{minor}" and dtype in p.dtypes for p in rows)
