"""GroupNorm and SiLU, forward and backward; the kernels of skip_norm_silu too.

Shapes: x [B, C, N], by strides: NCHW (pixels are neighbours) or channels_last (channels are).  The operators'
definitions and their checks are in ``difffast/ops/group_norm_silu.py`` and ``skip_norm_silu.py``.

Not one program per group: 32 groups of 2 samples would leave half of a GPU idle, and in channels_last a group's rows
are a few bytes long.  ``moments_kernel`` takes tiles of channels and pixels (in channels_last whole cache lines) and
leaves mean and M2, the sum of squared differences from it, of every channel in every span of pixels.  A small kernel
joins them to groups (Chan, Golub and LeVeque, 1979) and makes coefficients of every channel, with which
``apply_kernel`` goes over the pixels again.  An addend of one number per channel only moves the means: the first kernel
does not know of it.  Channels of skip_norm_silu that k steps share have their moments taken once.
Reductions have a fixed order and there are no atomics: the same bits in every run.
"""

# Constants and sizes in kernels are upper case, as in Triton's own code.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, registers

#: Programs of the kernels that reduce over pixels, at least, if there are pixels enough: some on every multiprocessor.
_PROGRAMS = 1024
#: Elements of a tile.
_TILE = 2048
#: Compiler options.  Unasked, ptxas now and then spills two registers to keep to 64.
OPTIONS = {"num_warps": 4, **registers(255)}


@triton.jit
def _program(columns, tiles):
    """(column, tile, row) of program column + columns * (tile + tiles * row).

    Other dimensions of a grid than the first end at 65535, and a video has more rows.
    """
    place = tl.program_id(0)
    return place % columns, place // columns % tiles, (place // (columns * tiles)).to(tl.int64)


@triton.jit
def _tile(
    x,  # [C, N] of one batch entry
    addend,  # the same, or anything if not ADDED
    c,  # int [CHANNELS]
    p,  # int [PIXELS]
    inside,  # bool [CHANNELS, PIXELS]
    stride_c,
    stride_p,
    ADDED: tl.constexpr,
    ACC: tl.constexpr,
):
    """x + addend [CHANNELS, PIXELS], 0 outside."""
    offsets = (c.to(tl.int64) * stride_c)[:, None] + (p.to(tl.int64) * stride_p)[None, :]
    z = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
    if ADDED:
        z += tl.load(addend + offsets, mask=inside, other=0.0).to(ACC)
    return z


@triton.jit(do_not_specialize=["addend_repeats"])
def moments_kernel(
    x,  # [B, C, N], strides below
    addend,  # [B // addend_repeats, C, N], the same strides
    moments,  # [2, B, splits, C] contiguous: mean, M2
    stride_b: tl.int64,
    stride_c,
    stride_p,
    addend_repeats,
    C,
    N,
    span,
    ADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program span of pixels + splits * (tile of channels + tiles * batch entry)."""
    splits, tiles = tl.cdiv(N, span), tl.cdiv(C, CHANNELS)
    split, tile, b = _program(splits, tiles)
    B = (tl.num_programs(0) // (splits * tiles)).to(tl.int64)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    first = split * span
    last = tl.minimum(first + span, N)
    # Welford's update at every place of the tile; the places meet after the loop.
    mean = tl.zeros([CHANNELS, PIXELS], ACC)
    m2 = tl.zeros([CHANNELS, PIXELS], ACC)
    seen = tl.zeros([], ACC)
    for start in range(first, last, PIXELS):
        inside = (c < C)[:, None] & (start + p < last)[None, :]
        z = _tile(
            x + b * stride_b, addend + b // addend_repeats * stride_b, c, start + p, inside, stride_c, stride_p,
            ADDED, ACC,
        )  # fmt: skip
        seen += 1.0
        change = tl.where(inside, z - mean, 0.0)
        mean += change / seen
        m2 += change * (z - mean)
    counts = (tl.maximum(last - first - p + PIXELS - 1, 0) // PIXELS).to(ACC)[None, :]
    center = tl.sum(mean * counts, 1) / (last - first).to(ACC)
    apart = mean - center[:, None]
    m2 = tl.sum(m2 + counts * apart * apart, 1)
    place = moments + (b * splits + split) * C + c
    tl.store(place, center, mask=c < C)
    tl.store(place + B * splits * C, m2, mask=c < C)


@triton.jit
def _channel_moments(
    moments,  # [2, rows, splits, channels] contiguous
    row,
    rows,
    channels,
    c,  # int [CHANNELS]
    inside,  # bool [SPLITS, CHANNELS]
    s,  # int [SPLITS]
    splits,
):
    """Mean and M2 [SPLITS, CHANNELS] of a row, 0 outside."""
    place = moments + (row * splits + s.to(tl.int64)[:, None]) * channels + c[None, :]
    mean = tl.load(place, mask=inside, other=0.0)
    return mean, tl.load(place + rows * splits * channels, mask=inside, other=0.0)


@triton.jit
def _group_moments(
    moments,  # [2, B, splits, own] contiguous
    shared_moments,  # [2, B // repeats, splits, C - own] contiguous
    addend,  # [B // addend_repeats, C] contiguous
    b,
    B,
    c,  # int [CHANNELS]
    in_group,  # bool [CHANNELS]
    s,  # int [SPLITS]
    splits,
    C,
    own,
    repeats,
    addend_repeats,
    SHARED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Mean and M2 [SPLITS, CHANNELS] of channels of either source, with the addend, 0 outside."""
    within = (s < splits)[:, None] & in_group[None, :]
    mine = within & (c < own)[None, :]
    mean, m2 = _channel_moments(moments, b, B, own, c, mine, s, splits)
    if SHARED:
        more_mean, more_m2 = _channel_moments(
            shared_moments, b // repeats, B // repeats, C - own, c - own, within & (c >= own)[None, :], s, splits
        )  # fmt: skip
        mean += more_mean
        m2 += more_m2
    if ADDED:
        added = tl.load(addend + b // addend_repeats * C + c, mask=in_group, other=0.0).to(mean.dtype)
        mean += tl.where(within, added[None, :], 0.0)
    return mean, m2


@triton.jit(do_not_specialize=["B", "C", "own", "repeats", "addend_repeats", "N", "splits", "span", "size", "eps"])
def coefficients_kernel(
    moments,  # [2, B, splits, own] contiguous
    shared_moments,  # [2, B // repeats, splits, C - own] contiguous
    addend,  # [B // addend_repeats, C] contiguous
    weight,  # [C]
    bias,  # [C]
    scale,  # [B, C] contiguous
    shift,  # [B, C] contiguous
    coefficients,  # [4, B, C] contiguous: center, gain, offset, rstd
    B,
    C,
    own,
    repeats,
    addend_repeats,
    N,
    splits,
    span,
    size,  # channels of a group
    eps,
    SHARED: tl.constexpr,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program group + groups * batch entry."""
    groups = C // size
    first = tl.program_id(0) % groups * size
    b = (tl.program_id(0) // groups).to(tl.int64)
    B = B.to(tl.int64)
    t = tl.arange(0, CHANNELS)
    s = tl.arange(0, SPLITS)
    pixels = tl.maximum(tl.minimum(span, N - s * span), 0).to(ACC)[:, None]
    total = size.to(ACC) * N.to(ACC)

    mean = tl.zeros([], ACC)
    for start in range(0, size, CHANNELS):
        means, _ = _group_moments(
            moments, shared_moments, addend, b, B, first + start + t, start + t < size, s, splits, C, own, repeats,
            addend_repeats, SHARED, ADDED,
        )  # fmt: skip
        mean += tl.sum(tl.sum(means * pixels, 1), 0)
    mean /= total
    squares = tl.zeros([], ACC)
    for start in range(0, size, CHANNELS):
        in_group = start + t < size
        means, m2 = _group_moments(
            moments, shared_moments, addend, b, B, first + start + t, in_group, s, splits, C, own, repeats,
            addend_repeats, SHARED, ADDED,
        )  # fmt: skip
        apart = tl.where(in_group[None, :], means - mean, 0.0)
        squares += tl.sum(tl.sum(m2 + pixels * apart * apart, 1), 0)
    rstd = 1.0 / tl.sqrt(squares / total + eps)

    for start in range(0, size, CHANNELS):
        in_group = start + t < size
        c = first + start + t
        center = mean + tl.zeros([CHANNELS], ACC)
        gain = rstd * tl.load(weight + c, mask=in_group).to(ACC)
        offset = tl.load(bias + c, mask=in_group).to(ACC)
        if ADDED:
            center -= tl.load(addend + b // addend_repeats * C + c, mask=in_group).to(ACC)
        if SCALED:
            factor = 1.0 + tl.load(scale + b * C + c, mask=in_group).to(ACC)
            gain *= factor
            offset = offset * factor + tl.load(shift + b * C + c, mask=in_group).to(ACC)
        place = coefficients + b * C + c
        tl.store(place, center, mask=in_group)
        tl.store(place + B * C, gain, mask=in_group)
        tl.store(place + 2 * B * C, offset, mask=in_group)
        tl.store(place + 3 * B * C, rstd + tl.zeros([CHANNELS], ACC), mask=in_group)


@triton.jit
def _load_coefficients(
    coefficients,  # [4, B, C] contiguous, from the first row and channel wanted
    c,  # int [CHANNELS]
    channels_in,  # bool [CHANNELS]
    plane,  # B * C
):
    """Center, gain and offset, each [CHANNELS, 1]."""
    center = tl.load(coefficients + c, mask=channels_in, other=0.0)
    gain = tl.load(coefficients + plane + c, mask=channels_in, other=0.0)
    offset = tl.load(coefficients + 2 * plane + c, mask=channels_in, other=0.0)
    return center[:, None], gain[:, None], offset[:, None]


@triton.jit(do_not_specialize=["x_repeats", "addend_repeats", "every", "row_size", "plane"])
def apply_kernel(
    x,  # [rows // x_repeats, C, N], strides below
    addend,  # [rows // addend_repeats, C, N], the same strides
    coefficients,  # [4, rows * every, row_size] contiguous, from the first channel wanted
    out,  # [rows, C, N], strides below
    stride_b: tl.int64,
    stride_c,
    stride_p,
    out_stride_b: tl.int64,
    out_stride_c,
    out_stride_p,
    x_repeats,
    addend_repeats,
    every,  # a row of x has the coefficients of so many
    row_size,
    plane: tl.int64,  # elements of one of the four
    C,
    N,
    ADDED: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program tile of pixels + columns * (tile of channels + tiles * row)."""
    column, tile, b = _program(tl.cdiv(N, PIXELS), tl.cdiv(C, CHANNELS))
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    p = column * PIXELS + tl.arange(0, PIXELS)
    inside = (c < C)[:, None] & (p < N)[None, :]
    center, gain, offset = _load_coefficients(coefficients + b * every * row_size, c, c < C, plane)
    z = _tile(
        x + b // x_repeats * stride_b, addend + b // addend_repeats * stride_b, c, p, inside, stride_c, stride_p,
        ADDED, ACC,
    )  # fmt: skip
    u = (z - center) * gain + offset
    if SILU:
        u *= tl.sigmoid(u)
    offsets = (c.to(tl.int64) * out_stride_c)[:, None] + (p.to(tl.int64) * out_stride_p)[None, :]
    tl.store(out + b * out_stride_b + offsets, u.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope(
    grad,  # [C, N] of one batch entry, strides as x's
    z,  # [CHANNELS, PIXELS] less the center
    c,
    p,
    inside,
    gain,
    offset,
    stride_c,
    stride_p,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
):
    """dL/du [CHANNELS, PIXELS], 0 outside."""
    du = _tile(grad, grad, c, p, inside, stride_c, stride_p, False, ACC)
    if SILU:
        u = z * gain + offset
        sigmoid = tl.sigmoid(u)
        du *= sigmoid * (1.0 + u * (1.0 - sigmoid))
    return du


@triton.jit(do_not_specialize=["addend_repeats"])
def sums_kernel(
    grad,  # [B, C, N], strides below
    x,  # [B, C, N], the same strides
    addend,  # [B // addend_repeats, C, N], the same strides
    coefficients,  # [4, B, C] contiguous
    sums,  # [2, B, splits, C] contiguous: of du, of du (z - center)
    stride_b: tl.int64,
    stride_c,
    stride_p,
    addend_repeats,
    C,
    N,
    span,
    ADDED: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program span of pixels + splits * (tile of channels + tiles * batch entry)."""
    splits, tiles = tl.cdiv(N, span), tl.cdiv(C, CHANNELS)
    split, tile, b = _program(splits, tiles)
    B = (tl.num_programs(0) // (splits * tiles)).to(tl.int64)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    first = split * span
    last = tl.minimum(first + span, N)
    center, gain, offset = _load_coefficients(coefficients + b * C, c, c < C, B * C)
    slopes = tl.zeros([CHANNELS, PIXELS], ACC)
    products = tl.zeros([CHANNELS, PIXELS], ACC)
    for start in range(first, last, PIXELS):
        inside = (c < C)[:, None] & (start + p < last)[None, :]
        z = _tile(
            x + b * stride_b, addend + b // addend_repeats * stride_b, c, start + p, inside, stride_c, stride_p,
            ADDED, ACC,
        )  # fmt: skip
        z -= center
        du = _slope(grad + b * stride_b, z, c, start + p, inside, gain, offset, stride_c, stride_p, SILU, ACC)
        slopes += du
        products += du * z
    place = sums + (b * splits + split) * C + c
    tl.store(place, tl.sum(slopes, 1), mask=c < C)
    tl.store(place + B * splits * C, tl.sum(products, 1), mask=c < C)


@triton.jit(do_not_specialize=["addend_repeats", "groups", "size"])
def gradient_kernel(
    grad,  # [B, C, N], strides below
    x,  # [B, C, N], the same strides
    addend,  # [B // addend_repeats, C, N], the same strides
    coefficients,  # [4, B, C] contiguous
    means,  # [2, B, groups] contiguous: what dz has less, and that per z - center
    dx,  # [B, C, N], the same strides
    stride_b: tl.int64,
    stride_c,
    stride_p,
    addend_repeats,
    C,
    N,
    groups,
    size,  # channels of a group
    ADDED: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program tile of pixels + columns * (tile of channels + tiles * batch entry)."""
    columns, tiles = tl.cdiv(N, PIXELS), tl.cdiv(C, CHANNELS)
    column, tile, b = _program(columns, tiles)
    B = (tl.num_programs(0) // (columns * tiles)).to(tl.int64)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    p = column * PIXELS + tl.arange(0, PIXELS)
    inside = (c < C)[:, None] & (p < N)[None, :]
    center, gain, offset = _load_coefficients(coefficients + b * C, c, c < C, B * C)
    constant = tl.load(means + b * groups + c // size, mask=c < C, other=0.0)[:, None]
    linear = tl.load(means + (B + b) * groups + c // size, mask=c < C, other=0.0)[:, None]
    z = _tile(
        x + b * stride_b, addend + b // addend_repeats * stride_b, c, p, inside, stride_c, stride_p, ADDED, ACC
    )  # fmt: skip
    z -= center
    du = _slope(grad + b * stride_b, z, c, p, inside, gain, offset, stride_c, stride_p, SILU, ACC)
    dz = du * gain - constant - z * linear
    offsets = b * stride_b + (c.to(tl.int64) * stride_c)[:, None] + (p.to(tl.int64) * stride_p)[None, :]
    tl.store(dx + offsets, dz.to(dx.dtype.element_ty), mask=inside)


def tiles(channels: int, pixels: int, channels_last: bool) -> dict[str, int]:
    """Tile sizes: long where elements are neighbours."""
    if channels_last:
        width = min(64, triton.next_power_of_2(channels))
        return {"CHANNELS": width, "PIXELS": _TILE // width}
    width = min(_TILE, max(16, triton.next_power_of_2(pixels)))
    return {"CHANNELS": _TILE // width, "PIXELS": width}


def splits(batch: int, channels: int, pixels: int, tile: dict[str, int]) -> tuple[int, int]:
    """-> (spans of pixels of which one program each takes the sums, their length)"""
    steps = triton.cdiv(pixels, tile["PIXELS"])
    programs = batch * triton.cdiv(channels, tile["CHANNELS"])
    span = triton.cdiv(steps, min(64, steps, triton.cdiv(_PROGRAMS, programs))) * tile["PIXELS"]
    return triton.cdiv(pixels, span), span


def coefficients_launch(parts: int, dtype: torch.dtype) -> dict:
    """Compile-time arguments of a launch of ``coefficients_kernel``."""
    rows = triton.next_power_of_2(parts)
    return {"SPLITS": rows, "CHANNELS": 1024 // rows, "ACC": ACC[dtype]}


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of [B, C, N], of a tensor in one of the two formats or a range of its channels."""
    return x.stride(0), x.stride(1), x.stride(-1)


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    addend: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    *,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """SiLU of the GroupNorm of x.

    Args:
        x: [B, C, H, W] or [B, C, N].
        addend: [Ba, C] or in the shape of x but for the batch; Ba divides B.
        scale, shift: [B, C], both or none.
        channels_last: whether to compute in that format; x may have any.

    Returns:
        out like x, and coefficients [4, B, C]: center, gain, offset, 1 / sqrt(var + eps).
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, (batch, channels) = x.contiguous(memory_format=layout), x.shape[:2]
    out = torch.empty_like(x)
    coefficients = x.new_empty(4, batch, channels, dtype=sums_dtype(x))
    if not batch:
        return out, coefficients
    by_row = None if addend is None or addend.ndim > 2 else addend.contiguous()
    full = None if addend is None or addend.ndim == 2 else addend.contiguous(memory_format=layout)
    repeats = 1 if addend is None else batch // addend.shape[0]
    pixels = x.numel() // (batch * channels)
    tile = tiles(channels, pixels, channels_last)
    parts, span = splits(batch, channels, pixels, tile)
    with on_device_of(x):
        means = moments(x, parts, span, tile, full, repeats)
        coefficients_kernel[(groups * batch,)](
            means, means, or_any(by_row, x), weight.contiguous(), bias.contiguous(),
            *(or_any(None if rows is None else rows.contiguous(), x) for rows in (scale, shift)), coefficients,
            batch, channels, channels, 1, repeats, pixels, parts, span, channels // groups, eps,
            SHARED=False, ADDED=by_row is not None, SCALED=scale is not None,
            **coefficients_launch(parts, x.dtype), **OPTIONS,
        )  # fmt: skip
        apply(x, coefficients, out, tile, silu, addend=full, addend_repeats=repeats)
    return out, coefficients


def moments(x: Tensor, parts: int, span: int, tile: dict, addend: Tensor | None = None, repeats: int = 1) -> Tensor:
    """Mean and M2 of every channel of x (+ addend) in every span of pixels, [2, B, parts, C]."""
    batch, channels = x.shape[:2]
    result = x.new_empty(2, batch, parts, channels, dtype=sums_dtype(x))
    moments_kernel[(parts * triton.cdiv(channels, tile["CHANNELS"]) * batch,)](
        x, or_any(addend, x), result, *strides(x), repeats, channels, x.numel() // (batch * channels), span,
        ADDED=addend is not None, **tile, ACC=ACC[x.dtype], **OPTIONS,
    )  # fmt: skip
    return result


def apply(
    x: Tensor,
    coefficients: Tensor,
    out: Tensor,
    tile: dict,
    silu: bool,
    *,
    first: int = 0,
    addend: Tensor | None = None,
    addend_repeats: int = 1,
) -> None:
    """out [rows, C, ...] = silu((x + addend - center) * gain + offset) with the coefficients from channel ``first`` on.

    Row b of out uses row b // (rows / x's rows) of x and row b * (coefficients' rows / rows) of the coefficients.
    """
    (rows, channels), (of_rows, row_size) = out.shape[:2], coefficients.shape[1:]
    pixels = out.numel() // (rows * channels)
    apply_kernel[(triton.cdiv(pixels, tile["PIXELS"]) * triton.cdiv(channels, tile["CHANNELS"]) * rows,)](
        x, or_any(addend, x), coefficients[..., first:], out, *strides(x), *strides(out), rows // x.shape[0],
        addend_repeats, of_rows // rows, row_size, of_rows * row_size, channels, pixels,
        ADDED=addend is not None, SILU=silu, **tile, ACC=ACC[x.dtype], **OPTIONS,
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    x: Tensor,
    coefficients: Tensor,
    groups: int,
    addend: Tensor | None,
    silu: bool,
    *,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`forward` for x, and the sums of which those of the parameters are made.

    Args:
        coefficients: from :func:`forward`.
        addend: one in the shape of x but for the batch; one of [Ba, C] is in the coefficients.
        channels_last: as in :func:`forward`.

    Returns:
        dx like x; sums [2, B, C] over the pixels: of du, and of du * (x + addend - center).
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad_out = x.contiguous(memory_format=layout), grad_out.contiguous(memory_format=layout)
    batch, channels = x.shape[:2]
    dx = torch.empty_like(x)
    if not batch:
        return dx, coefficients.new_empty(2, batch, channels)
    repeats = 1 if addend is None else batch // addend.shape[0]
    addend = None if addend is None else addend.contiguous(memory_format=layout)
    pixels, size = x.numel() // (batch * channels), channels // groups
    tile = tiles(channels, pixels, channels_last)
    parts, span = splits(batch, channels, pixels, tile)
    constants = {"ADDED": addend is not None, "SILU": silu, **tile, "ACC": ACC[x.dtype]}
    operands = (grad_out, x, or_any(addend, x), coefficients)
    blocks = triton.cdiv(channels, tile["CHANNELS"])
    partial = coefficients.new_empty(2, batch, parts, channels)
    with on_device_of(x):
        sums_kernel[(parts * blocks * batch,)](
            *operands, partial, *strides(x), repeats, channels, pixels, span, **constants, **OPTIONS
        )
        sums = partial.sum(2)
        means = (sums * coefficients[1]).unflatten(2, (groups, size)).sum(3) / (size * pixels)
        means[1] *= coefficients[3, :, ::size].square()
        gradient_kernel[(triton.cdiv(pixels, tile["PIXELS"]) * blocks * batch,)](
            *operands, means, dx, *strides(x), repeats, channels, pixels, groups, size, **constants, **OPTIONS
        )
    return dx, sums


ACC = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64}


def sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def or_any(operand: Tensor | None, x: Tensor) -> Tensor:
    """A pointer for an operand that a kernel will not read."""
    return x if operand is None else operand


def aot_cases(capability: int, quick: bool = False) -> Iterator[tuple]:
    """Every launch, as the functions above make it, for an ahead-of-time compiler.

    Yields:
        (name, kernel, signature, compile-time arguments, compiler options); a ``:16`` after a type means a multiple of
        16, as in Triton's own tools.
    """
    shapes = ((320, 64 * 64),) if quick else ((320, 64 * 64), (2560, 8 * 8), (48, 9 * 7))
    for kind in ("bf16",) if quick else ("bf16", "fp16", "fp32"):
        for channels, pixels in shapes if kind == "bf16" else shapes[:1]:
            for channels_last in (False, True):
                tile = {**tiles(channels, pixels, channels_last), "ACC": tl.float32}
                parts, _ = splits(2, channels, pixels, tile)
                sums = coefficients_launch(parts, torch.float32)
                name = f"{kind} {channels}x{pixels} {'NHWC' if channels_last else 'NCHW'}"
                aligned = ":16" if channels % 16 == 0 and pixels % 16 == 0 else ""
                for added in (False, True):
                    flags = {"ADDED": added, "SILU": True}
                    for kernel, constants in (
                        (moments_kernel, {"ADDED": added, **tile}),
                        (coefficients_kernel, {"SHARED": added, "ADDED": added, "SCALED": added, **sums}),
                        (apply_kernel, flags | tile),
                        (sums_kernel, flags | tile),
                        (gradient_kernel, flags | tile),
                    ):
                        signature, unit = _signature(kernel, constants, kind, channels_last, aligned)
                        label = f"{kernel.__name__.removesuffix('_kernel')} {name}{' added' if added else ''}"
                        yield label, kernel, signature, {**constants, **unit}, OPTIONS


def _signature(
    kernel: triton.JITFunction, constants: dict, kind: str, channels_last: bool, aligned: str
) -> tuple[dict[str, str], dict[str, int]]:
    """-> (types of a kernel's arguments for operands of this kind, strides of neighbours)"""
    neighbours = ("stride_c", "out_stride_c") if channels_last else ("stride_p", "out_stride_p")
    unit = {name: 1 for name in neighbours if name in kernel.arg_names}
    sums = ("moments", "shared_moments", "coefficients", "sums", "means")
    types = dict.fromkeys(("x", "addend", "weight", "bias", "scale", "shift", "out", "grad", "dx"), f"*{kind}:16")
    types |= dict.fromkeys(sums, "*fp32:16") | {"eps": "fp32", "plane": "i64", "span": "i32:16"}
    types |= dict.fromkeys(("stride_b", "out_stride_b"), f"i64{aligned}")
    types |= dict.fromkeys(("stride_c", "stride_p", "out_stride_c", "out_stride_p", "C", "N"), f"i32{aligned}")
    if kernel is coefficients_kernel:
        types |= dict.fromkeys(("C", "N", "span"), "i32")
    types |= dict.fromkeys((*constants, *unit), "constexpr")
    return {name: types.get(name, "i32") for name in kernel.arg_names}, unit
