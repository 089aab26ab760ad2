"""The kernels of group_norm_silu and skip_norm_silu; ``group_norm_silu.py`` and ``skip_norm_silu.py`` launch them.

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

import triton
import triton.language as tl


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
