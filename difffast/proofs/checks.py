"""Checks: whether a candidate computes what the operator's definition says, and touches nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Candidate
from .problems import KINDS, Problem, find_exact_dtype

#: Most of a candidate's error, as multiples of that of PyTorch's own way: root mean square, and largest.
RMS, LARGEST = 1.2, 3.0
#: The same for the root mean square of data in which a few rows make nearly all of the error, whose rounding is luck.
RMS_OF_FEW = 2.0

Outputs = tuple[Tensor, ...]


class RefutedError(Exception):
    """A candidate is not right; the message is the reason."""


@dataclass(frozen=True)
class Expected:
    """What a problem's outputs should be.

    Attributes:
        exact: in float64.
        allowed: of each output, the most error in the root mean square and in the largest element.
    """

    exact: Outputs
    allowed: tuple[tuple[float, float], ...]


def _measure_error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    if not exact.numel():
        return 0.0, 0.0
    error = (found.double() - exact).abs()
    return float(error.square().mean().sqrt()), float(error.max())


def expect(problem: Problem, default: Candidate, differentiate: bool = False, rms_factor: float = RMS) -> Expected:
    """Compute the definition in float64, and the error of PyTorch's own ways in the problem's dtype.

    Those are the eager composition and the default; a result that is not finite is no measure.  Wherever both are
    exact, one rounding of the result is allowed.  Large attentions on a CPU are defined in float32.

    Args:
        differentiate: take gradients for outputs.
        rms_factor: :data:`RMS` or :data:`RMS_OF_FEW`.
    """
    kind, key = KINDS[problem.key.operator], problem.key
    dtype = find_exact_dtype(problem)
    tensors = tuple(x.to(dtype) for x in problem.tensors)
    exact = tuple(x.double() for x in _run(lambda *x: kind.define(key, *x), tensors, differentiate))
    with default.around():
        found = [_run(lambda *x: default.call(key, *x), problem.tensors, differentiate)]
    if kind.compose is not None and dtype != key.dtype:
        found.append(_run(lambda *x: kind.compose(key, *x), problem.tensors, differentiate))
    allowed = []
    for index, each in enumerate(exact):
        errors = [_measure_error(outputs[index], each) for outputs in found]
        finite = [pair for pair in errors if pair[1] < float("inf")]
        rms, largest = (max((pair[i] for pair in finite), default=0.0) for i in (0, 1))
        eps = torch.finfo(key.dtype).eps
        size = float(each.square().mean().sqrt()) if each.numel() else 0.0
        most = float(each.abs().max()) if each.numel() else 0.0
        allowed.append((max(rms_factor * rms, eps / 2 * size), max(LARGEST * largest, eps * most)))
    return Expected(exact, tuple(allowed))


def _run(function: Callable[..., Outputs], tensors: Sequence[Tensor], differentiate: bool) -> Outputs:
    """Return the outputs, or the gradients of a sum of them with fixed weights."""
    if not differentiate:
        with torch.no_grad():
            return function(*tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        total = sum(
            (out.double() * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum()
            for out in function(*leaves)
        )
        return torch.autograd.grad(total, leaves)


def check(candidate: Candidate, problem: Problem, expected: Expected, differentiate: bool = False) -> float:
    """Check a candidate on a problem.

    It runs twice; the second time, memory that it allocates is full of NaN, and lies between canaries.

    Returns:
        Its worst error as a part of what is allowed.

    Raises:
        RefutedError: it is not right.
    """
    before = [_as_bytes(arena).clone() for arena in problem.arenas]

    def run() -> Outputs:
        with candidate.around():
            found = _run(lambda *x: candidate.call(problem.key, *x), problem.tensors, differentiate)
        if found[0].is_cuda:
            torch.cuda.synchronize()
        return found

    first = run()
    with _fill_with_nan(), _guard(first):
        second = run()
    for arena, bytes_before in zip(problem.arenas, before, strict=True):
        if not torch.equal(_as_bytes(arena), bytes_before):
            arena.copy_(bytes_before.view(arena.dtype))  # for those that are checked after it
            raise RefutedError("it wrote into its operands or into memory beside them")
    if len(first) != len(expected.exact):
        raise RefutedError(f"it returned {len(first)} tensors, expected {len(expected.exact)}")
    worst = 0.0
    for found, again, exact, allowed in zip(first, second, expected.exact, expected.allowed, strict=True):
        # First those in memory of NaN: what was not written has its own reason.
        worst = max(worst, _compare(again, exact, allowed), _compare(found, exact, allowed))
        if candidate.ours and not differentiate and not torch.equal(_as_bytes(found), _as_bytes(again)):
            raise RefutedError("two runs gave different bits")
    return worst


def _compare(found: Tensor, exact: Tensor, allowed: tuple[float, float]) -> float:
    if found.shape != exact.shape:
        raise RefutedError(f"its result has shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    worst, errors = 0.0, _measure_error(found, exact)
    if not errors[1] < float("inf"):
        missing = int((~found.isfinite() & exact.isfinite()).sum())
        raise RefutedError(f"{missing} of {exact.numel()} elements are not finite, or were not written")
    names = ("in the root mean square", "in the largest element")
    for name, error, most in zip(names, errors, allowed, strict=True):
        if error > most:
            raise RefutedError(f"error {error:.2e} {name}, allowed {most:.2e}")
        worst = max(worst, error / most if most else 0.0)
    return worst


def _as_bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


@contextlib.contextmanager
def _fill_with_nan() -> Iterator[None]:
    """Let memory be NaN when it is allocated, whoever allocates it."""
    earlier = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # What torch.use_deterministic_algorithms calls; it would import the compiler.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(earlier[0], warn_only=earlier[1])


@contextlib.contextmanager
def _guard(outputs: Outputs) -> Iterator[None]:
    """Let outputs of these sizes be allocated between canaries, as far as the allocator fills the gap that is left.

    Raises:
        RefutedError: a canary is dead.
    """
    rows = [[torch.full_like(out, 1.5) for _ in range(3)] for out in outputs]
    expected = [_as_bytes(row[0]).clone() for row in rows]
    for row in rows:
        del row[1]
    yield
    for row, bytes_before in zip(rows, expected, strict=True):
        if not all(torch.equal(_as_bytes(canary), bytes_before) for canary in row):
            raise RefutedError("it wrote beyond its results")
