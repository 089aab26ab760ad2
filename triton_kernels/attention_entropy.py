"""Entropy of the subjects' columns of a softmax over words: forward and backward, one launch each.

Shapes: maps [B, N, T], any strides; anchors, increasing columns in 1 .. n_tokens <= 127, one a subject.  The operator's
definition and its checks are in ``difffast/ops/attention_entropy.py``.

Anchors travel as two 64-bit masks, so that neither their places nor their number recompiles a kernel.  One program
makes the loss of one batch entry: it writes its subjects' columns (a few KiB, which stay in the cache), then goes over
them for the minimum, for S and for the sums.  Reductions have a fixed order and there are no atomics: the same bits in
every run.  The backward pass reads p and need not make it again from rounded numbers; its programs are independent.
"""

# Constants and sizes in kernels are upper case, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import bits, on_device_of, registers

LOG2_E = 1 / math.log(2)
STATS = tl.constexpr(4)


@triton.jit
def _chosen(low, high, TOKENS: tl.constexpr):
    """Which of the columns 0 .. TOKENS - 1 are anchors, int32 [TOKENS] of 0 and 1: bits of two 64-bit words."""
    t = tl.arange(0, TOKENS)
    word = tl.where(t < 64, low.to(tl.int64), high.to(tl.int64))
    return ((word >> (t & 63).to(tl.int64)) & 1).to(tl.int32)


@triton.jit
def _exponentials(
    maps,  # [N, T] of one batch entry
    rows,  # int64 [ROWS]
    rows_in,  # bool [ROWS], which rows exist
    stride_n,
    stride_t,
    n_tokens,
    factor,  # log2(e) / tau: the exponentials are of base two
    TOKENS: tl.constexpr,
    ACC: tl.constexpr,
):
    """exp((maps - largest word) / tau) [ROWS, TOKENS], 0 but for the words, and its sum [ROWS] over the words."""
    t = tl.arange(0, TOKENS)
    word = ((t >= 1) & (t <= n_tokens))[None, :]
    offsets = (rows * stride_n)[:, None] + (t.to(tl.int64) * stride_t)[None, :]
    x = tl.load(maps + offsets, mask=rows_in[:, None] & word, other=0.0).to(ACC)
    x = tl.where(word, x, -float("inf"))
    e = tl.exp2((x - tl.max(x, 1)[:, None]) * factor)
    return e, tl.sum(e, 1)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_n", "low", "high", "K", "N", "n_tokens", "factor", "eps", "weight", "detach_min",
    ]
)  # fmt: skip
def forward_kernel(
    maps,  # [B, N, T], strides below
    loss,  # [B]
    shares,  # [B, K, N] contiguous
    stats,  # [B, K, STATS] contiguous
    argmin,  # int64 [B, K] contiguous
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_t,
    low: tl.int64,  # anchors 0 .. 63, one bit each
    high: tl.int64,  # anchors 64 .. 127
    K,
    N,
    n_tokens,
    factor,
    eps,
    weight,
    detach_min,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program (batch entry)."""
    b = tl.program_id(0).to(tl.int64)
    chosen = _chosen(low, high, TOKENS)
    slots = b * K + tl.cumsum(chosen, 0).to(tl.int64) - 1
    for start in range(0, N, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        e, total = _exponentials(
            maps + b * stride_b, rows, rows < N, stride_n, stride_t, n_tokens, factor, TOKENS, ACC
        )  # fmt: skip
        target = shares + (slots * N)[None, :] + rows[:, None]
        tl.store(target, e / total[:, None], mask=(rows < N)[:, None] & (chosen > 0)[None, :])
    # Columns were written by other threads than those that read them next.
    tl.debug_barrier()

    entropies = tl.zeros([], ACC)
    for subject in range(0, K):
        place = b * K + subject
        column = shares + place * N
        pixels = tl.arange(0, PIXELS)
        least = tl.full([PIXELS], float("inf"), ACC)
        for start in range(0, N, PIXELS):
            least = tl.minimum(least, tl.load(column + start + pixels, mask=start + pixels < N, other=float("inf")))
        least = tl.min(least, 0)

        rise = tl.zeros([PIXELS], ACC)
        lowest = tl.full([PIXELS], 2147483647, tl.int32)
        for start in range(0, N, PIXELS):
            inside = start + pixels < N
            x = tl.load(column + start + pixels, mask=inside, other=0.0)
            rise += tl.where(inside, x - least, 0.0)
            lowest = tl.minimum(lowest, tl.where(inside & (x == least), start + pixels, 2147483647))
        rise = tl.sum(rise, 0)
        lowest = tl.min(lowest, 0)
        uniform = rise == 0
        divisor = tl.where(uniform, 1.0, rise)

        # h = -g / weight.  sum(h) and N sum(h p) are nearly equal for a nearly uniform p: subtracted in every pixel.
        entropy = tl.zeros([PIXELS], ACC)
        excess = tl.zeros([PIXELS], ACC)
        mean = tl.zeros([PIXELS], ACC)
        for start in range(0, N, PIXELS):
            inside = start + pixels < N
            x = tl.load(column + start + pixels, mask=inside, other=0.0)
            p = tl.where(inside, x - least, 0.0) / divisor
            logarithm = tl.log(p + eps)
            h = tl.where(inside, logarithm + p / (p + eps), 0.0)
            entropy += p * logarithm
            excess += h * (1.0 - p * N)
            mean += h * p
            tl.store(column + start + pixels, p, mask=inside)
        part = tl.where(uniform, 0.0, -weight * tl.sum(entropy, 0))
        entropies += part
        tl.store(stats + place * STATS, rise)
        tl.store(stats + place * STATS + 1, tl.where(uniform, 0.0, -weight * tl.sum(excess, 0)))
        tl.store(stats + place * STATS + 2, tl.where(uniform, 0.0, -weight * tl.sum(mean, 0)))
        tl.store(stats + place * STATS + 3, part)
        # Where every pixel is NaN none is lowest, and NaN is all that follows.
        tl.store(argmin + place, tl.where((detach_min != 0) | uniform | (lowest >= N), -1, lowest).to(tl.int64))
    tl.store(loss + b, entropies)


@triton.jit(
    do_not_specialize=[
        "grad_stride", "stride_b", "stride_n", "low", "high", "K", "N", "T", "n_tokens", "factor", "eps", "weight",
        "inverse_tau",
    ]
)  # fmt: skip
def backward_kernel(
    grad_loss,  # [B], stride below
    maps,  # [B, N, T], strides below
    shares,  # [B, K, N] contiguous
    stats,  # [B, K, STATS] contiguous
    argmin,  # int64 [B, K] contiguous
    grad,  # [B, N, T] contiguous
    grad_stride: tl.int64,
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_t,
    low: tl.int64,  # anchors 0 .. 63, one bit each
    high: tl.int64,  # anchors 64 .. 127
    K,
    N,
    T,
    n_tokens,
    factor,
    eps,
    weight,
    inverse_tau,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program row tile + tiles * batch entry."""
    tiles = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rows_in = rows < N
    e, total = _exponentials(maps + b * stride_b, rows, rows_in, stride_n, stride_t, n_tokens, factor, TOKENS, ACC)
    words = e / total[:, None]

    chosen = _chosen(low, high, TOKENS) > 0
    places = b * K + tl.cumsum(chosen.to(tl.int32), 0).to(tl.int64) - 1
    rise = tl.load(stats + places * STATS, mask=chosen, other=0.0)
    excess = tl.load(stats + places * STATS + 1, mask=chosen, other=0.0)
    g_mean = tl.load(stats + places * STATS + 2, mask=chosen, other=0.0)
    lowest = tl.load(argmin + places, mask=chosen, other=-1)
    # S = 0: a column that is no subject, or a uniform one.
    divisor = tl.where(rise == 0, 1.0, rise)
    at_lowest = excess / divisor
    p = tl.load(shares + (places * N)[None, :] + rows[:, None], mask=rows_in[:, None] & chosen[None, :], other=0.0)
    slope = (-weight * (tl.log(p + eps) + p / (p + eps)) - g_mean[None, :]) / divisor[None, :]
    slope -= tl.where(rows[:, None] == lowest[None, :], at_lowest[None, :], 0.0)
    slope = tl.where((rise == 0)[None, :], 0.0, slope)

    inner = tl.sum(words * slope, 1)
    scale = tl.load(grad_loss + b * grad_stride).to(ACC) * inverse_tau
    t = tl.arange(0, TOKENS)
    target = grad + (b * N + rows)[:, None] * T + t[None, :]
    # Other columns of the tile have words = 0, but 0 * NaN is not zero.
    result = tl.where(((t >= 1) & (t <= n_tokens))[None, :], words * (slope - inner[:, None]) * scale, 0.0)
    tl.store(target, result, mask=rows_in[:, None] & (t < T)[None, :])
    for start in range(TOKENS, T, TOKENS):
        zeros = tl.zeros([ROWS, TOKENS], ACC)
        tl.store(target + start, zeros, mask=rows_in[:, None] & (start + t < T)[None, :])


def _tile(n_tokens: int) -> int:
    """Columns of a tile: the start token and all words."""
    return max(16, triton.next_power_of_2(n_tokens + 1))


def forward_launch(n_tokens: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """Compile-time arguments and compiler options of a forward launch."""
    tokens = _tile(n_tokens)
    constants = {"TOKENS": tokens, "ROWS": 4096 // tokens, "PIXELS": 1024, "ACC": _ACC[dtype]}
    # One program is alone on its multiprocessor and may have its registers; unasked, ptxas spills to save some.
    return constants, {"num_warps": 8, **registers(192)}


def backward_launch(n_tokens: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """Compile-time arguments and compiler options of a backward launch."""
    tokens = _tile(n_tokens)
    return {"TOKENS": tokens, "ROWS": 1024 // tokens, "ACC": _ACC[dtype]}, {"num_warps": 4}


def forward(
    maps: Tensor, anchors: Sequence[int], n_tokens: int, tau: float, eps: float, weight: float, detach_min: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of maps [B, N, T] and what its gradient needs.

    Args:
        anchors: strictly increasing columns in 1 .. n_tokens.

    Returns:
        loss [B]; shares [B, K, N], p of each subject; stats [B, K, 4]: S, sum(g) - N gbar, gbar, the subject's part
        of the loss; argmin [B, K], the pixel that carries the gradient of the minimum, -1 for none.
    """
    (batch, pixels, _), subjects = maps.shape, len(anchors)
    loss = maps.new_empty([batch])
    shares = maps.new_empty([batch, subjects, pixels])
    stats = maps.new_empty([batch, subjects, STATS.value])
    argmin = maps.new_empty([batch, subjects], dtype=torch.int64)
    if batch:
        constants, options = forward_launch(n_tokens, maps.dtype)
        with on_device_of(maps):
            forward_kernel[(batch,)](
                maps, loss, shares, stats, argmin, *maps.stride(), *bits(anchors), subjects, pixels, n_tokens,
                LOG2_E / tau, eps, weight, int(detach_min), **constants, **options,
            )  # fmt: skip
    return loss, shares, stats, argmin


def backward(
    grad_loss: Tensor,
    maps: Tensor,
    shares: Tensor,
    stats: Tensor,
    argmin: Tensor,
    anchors: Sequence[int],
    n_tokens: int,
    tau: float,
    eps: float,
    weight: float,
) -> Tensor:
    """Gradient of :func:`forward` for maps, contiguous [B, N, T], from ``grad_loss`` [B] at any stride.

    Args:
        shares, stats, argmin: contiguous, from :func:`forward` with the same other arguments.
    """
    batch, pixels, columns = maps.shape
    grad = maps.new_empty(maps.shape)
    if batch:
        constants, options = backward_launch(n_tokens, maps.dtype)
        with on_device_of(maps):
            backward_kernel[(triton.cdiv(pixels, constants["ROWS"]) * batch,)](
                grad_loss, maps, shares, stats, argmin, grad, *grad_loss.stride(), *maps.stride(), *bits(anchors),
                len(anchors), pixels, columns, n_tokens, LOG2_E / tau, eps, weight, 1 / tau, **constants, **options,
            )  # fmt: skip
    return grad


_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def aot_cases(capability: int, quick: bool = False) -> Iterator[tuple]:
    """Every launch, as the functions above make it, for an ahead-of-time compiler.

    Yields:
        (name, kernel, signature, compile-time arguments, compiler options); a ``:16`` after a type means a multiple of
        16, as in Triton's own tools.
    """
    for n_tokens in (12, 75) if quick else (12, 20, 50, 75):
        for name, kernel, launch in (
            ("forward", forward_kernel, forward_launch),
            ("backward", backward_kernel, backward_launch),
        ):
            constants, options = launch(n_tokens, torch.float32)
            signature = _signature(kernel, constants)
            yield f"{name} fp32 n={n_tokens}", kernel, signature, {**constants, "stride_t": 1}, options


def _signature(kernel: triton.JITFunction, constants: dict) -> dict[str, str]:
    """Types of a kernel's arguments for contiguous maps in float32."""
    pointers = dict.fromkeys(("maps", "loss", "shares", "stats", "grad_loss", "grad"), "*fp32:16")
    types = pointers | {"argmin": "*i64:16", "stride_t": "constexpr"}
    types |= dict.fromkeys(("factor", "eps", "weight", "inverse_tau"), "fp32")
    types |= dict.fromkeys(("stride_b", "stride_n", "grad_stride", "low", "high"), "i64")
    types |= dict.fromkeys(constants, "constexpr")
    return {name: types.get(name, "i32") for name in kernel.arg_names}
