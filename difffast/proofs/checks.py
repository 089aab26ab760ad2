"""Checks: whether a candidate computes what the operator's definition says, and touches nothing else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Candidate
from .parts import Part, split
from .problems import KINDS, Problem

#: Most of a candidate's error, as multiples of that of PyTorch's own way: root mean square, and largest.
RMS, LARGEST = 1.2, 3.0
#: Bytes above which a C library gives a tensor pages of its own, which have no neighbours to write into.
_MAPPED = 1 << 25

Outputs = tuple[Tensor, ...]


class RefutedError(Exception):
    """A candidate is not right; the message is the reason."""


@dataclass(frozen=True)
class Expected:
    """What a problem's outputs should be.

    Attributes:
        pieces: of each part, the outputs in float64.
        plain: the outputs of PyTorch's own way, of which :attr:`pieces` may be a few pieces only.
        whole: whether the pieces are all of it.
        allowed: of each output, the most error in the root mean square and in the largest element.
        apart: of each output, how far from ``plain`` one may be, likewise.
    """

    pieces: tuple[tuple[Part, Outputs], ...]
    plain: Outputs
    whole: bool
    allowed: tuple[tuple[float, float], ...]
    apart: tuple[tuple[float, float], ...]


class _Error:
    """Errors of an output, gathered piece by piece."""

    def __init__(self) -> None:
        self._squares, self._count, self._largest = 0.0, 0, 0.0

    def add(self, found: Tensor, exact: Tensor | float) -> None:
        """Add the error of a piece."""
        if found.numel():
            error = found.double() - exact
            largest = float(torch.linalg.vector_norm(error, float("inf")))
            self._largest = max(self._largest, largest if largest < float("inf") else float("inf"))
            self._squares += float(torch.linalg.vector_norm(error)) ** 2
            self._count += found.numel()

    @property
    def pair(self) -> tuple[float, float]:
        """The root mean square and the largest."""
        return math.sqrt(self._squares / max(1, self._count)), self._largest


def expect(problem: Problem, default: Candidate, differentiate: bool = False) -> Expected:
    """Compute the definition in float64, and the error of PyTorch's own ways in the problem's dtype.

    Those are the eager composition and the default; a result that is not finite is no measure.  Wherever both are
    exact, one rounding of the result is allowed.

    Args:
        differentiate: take gradients for outputs.
    """
    kind, key, tensors = KINDS[problem.key.operator], problem.key, problem.tensors
    with default.around():
        plain = _run(lambda *x: default.call(key, *x), tensors, differentiate)
    if differentiate:
        parts, whole = [Part((...,) * len(tensors), (...,) * len(plain))], True
    else:
        parts, whole = split(key, [x.shape for x in tensors], tensors[0].device)
    pieces = []
    sizes = [_Error() for _ in plain]
    ways = [[_Error() for _ in plain]] + ([] if kind.compose is None else [[_Error() for _ in plain]])
    for part in parts:
        operands = [x[index] for x, index in zip(tensors, part.operands, strict=True)]
        exact = _run(lambda *x: kind.define(key, *x), [x.double() for x in operands], differentiate)
        pieces.append((part, exact))
        found = [[x[index] for x, index in zip(plain, part.outputs, strict=True)]]
        if kind.compose is not None:
            found.append(_run(lambda *x: kind.compose(key, *x), operands, differentiate))
        for i, each in enumerate(exact):
            sizes[i].add(each, 0.0)
            for way, outputs in zip(ways, found, strict=True):
                way[i].add(outputs[i], each)
    eps = torch.finfo(key.dtype).eps
    allowed, apart = [], []
    for i, size in enumerate(sizes):
        finite = [way[i].pair for way in ways if way[i].pair[1] < float("inf")]
        rms, largest = (max((pair[j] for pair in finite), default=0.0) for j in (0, 1))
        allowed.append((max(RMS * rms, eps / 2 * size.pair[0]), max(LARGEST * largest, eps * size.pair[1])))
        apart.append((allowed[i][0] + rms, (allowed[i][1] + largest) * _grow(plain[i], size.pair[1])))
    return Expected(tuple(pieces), plain, whole, tuple(allowed), tuple(apart))


def _grow(plain: Tensor, largest: float) -> float:
    """Return how much larger the largest element of everything is than that of the pieces: errors grow with it."""
    most = float(torch.linalg.vector_norm(plain, float("inf"))) if plain.numel() else 0.0
    return max(1.0, most / largest) if largest and most < float("inf") else 1.0


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
            _as_bytes(arena).copy_(bytes_before)  # for those that are checked after it
            raise RefutedError("it wrote into its operands or into memory beside them")
    if len(first) != len(expected.plain):
        raise RefutedError(f"it returned {len(first)} tensors, expected {len(expected.plain)}")
    # First those in memory of NaN: what was not written has its own reason.
    worst = _compare(second, expected)
    same = all(torch.equal(_as_bytes(a), _as_bytes(b)) for a, b in zip(first, second, strict=True))
    if candidate.ours and not differentiate and not same:
        raise RefutedError("two runs gave different bits")
    return worst if same else max(worst, _compare(first, expected))


def _compare(outputs: Outputs, expected: Expected) -> float:
    """Return the worst error as a part of what is allowed."""
    worst = 0.0
    for i, (found, plain) in enumerate(zip(outputs, expected.plain, strict=True)):
        if found.shape != plain.shape:
            raise RefutedError(f"its result has shape {tuple(found.shape)}, expected {tuple(plain.shape)}")
        error = _Error()
        for part, exact in expected.pieces:
            error.add(found[part.outputs[i]], exact[i])
        worst = max(worst, _judge(error.pair, expected.allowed[i], "", found))
        if not expected.whole and found.numel():
            difference = found.float() - plain.float() if found.dtype != torch.float64 else found - plain
            norms = [float(torch.linalg.vector_norm(difference, order)) for order in (2, float("inf"))]
            pair = norms[0] / math.sqrt(max(1, found.numel())), norms[1]
            worst = max(worst, _judge(pair, expected.apart[i], " from PyTorch's own way", found))
    return worst


def _judge(errors: tuple[float, float], allowed: tuple[float, float], what: str, found: Tensor) -> float:
    """Return errors as a part of what is allowed."""
    if not errors[1] < float("inf"):
        missing = int((~found.isfinite()).sum())
        raise RefutedError(f"{missing} of {found.numel()} elements are not finite, or were not written")
    worst = 0.0
    for name, error, most in zip(("in the root mean square", "in the largest element"), errors, allowed, strict=True):
        if error > most:
            raise RefutedError(f"error {error:.2e}{what} {name}, allowed {most:.2e}")
        worst = max(worst, error / most if most else 0.0)
    return worst


def _as_bytes(x: Tensor) -> Tensor:
    """Return a tensor's bits, as numbers of four bytes where that is possible."""
    flat = x.detach().contiguous().view(-1)
    return flat.view(torch.uint8 if flat.nbytes % 4 or flat.data_ptr() % 4 else torch.int32)


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
    small = [out for out in outputs if out.is_cuda or out.nbytes <= _MAPPED]
    rows = [[torch.full_like(out, 1.5) for _ in range(3)] for out in small]
    for row in rows:
        del row[1]
    yield
    for row in rows:
        if not all(bool((canary == 1.5).all()) for canary in row):
            raise RefutedError("it wrote beyond its results")
