"""Cross attention over at most 128 text keys, with head-mean maps of chosen keys: forward and backward.

Shapes: q [B, H, N, d], k and v [Bk, H, T, d] with B = Bk * r, T <= 128, d <= 256, any strides.  Logits are
``scale * q k^T``; ``sink`` further keys have logit 0 and value 0 and are not stored.  The operator's definition and its
checks are in ``difffast/ops/cross_attention.py``; here only what a launch needs is checked.

All keys fit one tile, so the softmax needs one pass: no running maximum and no rescaling.  77 keys are a tile of 64 and
one of 16, head widths are chunks of 64 (or one of 16 / 32) and one narrower rest: padding both to a power of two would
compute 1.7 times the products at T = 77 and up to 1.6 times at d = 40, 80, 160.

Strides are passed in units of ``VECTOR`` elements, so that the compiler can prove 16-byte loads for every head width
(d = 40: Triton alone recognises multiples of 16 elements only) and none of them recompiles a kernel.  The start of a
tile is a 64-bit offset; within a tile offsets are 32 bits wide, since 64-bit ones took as many registers as the scores.

Kernels on wgmma run their products inside a loop, pipelined where no maps are kept, even for a single turn.  Straight
on, the assembler of CUDA 12.8 (in the wheels of Triton 3.6 and 3.7) reads a uniform register that it has never written
when it makes the descriptor of an operand in shared memory whose place an earlier operand had: on an H100 the results
were wrong, or the access illegal.  ``tests/helpers/triton_aot.py`` looks for such registers in the machine code.

float32 products are ``ieee``, on the FMA units: as exact as PyTorch's own.  ``tf32x3``, three tensor-core products of
operands split in two, keeps about two bits fewer and holds both halves of every operand in registers, which spilled at
each shape tried; float32 has tiles of its own below.
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

LOG2_E = tl.constexpr(1 / math.log(2))


@triton.jit
def load_columns(x, x_rows, x_in, x_stride_d, cols, D: tl.constexpr):
    """[rows, columns] of x [rows, D], zeros outside; x_rows are the offsets of the rows in elements."""
    mask = x_in[:, None] & (cols < D)[None, :]
    return tl.load(x + (x_rows[:, None] + (cols * x_stride_d)[None, :]), mask=mask, other=0.0)


@triton.jit
def store_columns(acc, out, out_rows, out_in, cols, D: tl.constexpr):
    """acc [rows, columns] to out [rows, D], rows of D neighbours at offsets out_rows in elements."""
    mask = out_in[:, None] & (cols < D)[None, :]
    tl.store(out + (out_rows[:, None] + cols[None, :]), acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_products(
    s0,
    s1,
    x,  # [BLOCK, D], any strides: first row of this tile
    x_rows,  # int32 [BLOCK], offsets of the rows in elements
    x_in,  # bool [BLOCK], which rows exist
    x_stride_d,
    y,  # [T, D], any strides
    y_stride_t,  # in elements
    y_stride_d,
    T,
    cols,  # int32 [WIDTH], columns to multiply
    D: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """s0 and s1 of :func:`products`, plus the products over some columns."""
    t = tl.arange(0, KEYS)
    xc = load_columns(x, x_rows, x_in, x_stride_d, cols, D).to(DOT)
    yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
    if TRANSPOSED:
        s0 = tl.dot(yc, tl.trans(xc), s0, input_precision="ieee", out_dtype=ACC)
    else:
        s0 = tl.dot(xc, tl.trans(yc), s0, input_precision="ieee", out_dtype=ACC)
    if KEYS_REST > 0:
        t = KEYS + tl.arange(0, KEYS_REST)
        yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
        s1 = tl.dot(xc, tl.trans(yc), s1, input_precision="ieee", out_dtype=ACC)
    return s0, s1


@triton.jit
def products(
    x,  # [BLOCK, D], any strides: first row of this tile
    x_rows,  # int32 [BLOCK], offsets of the rows in elements
    x_in,  # bool [BLOCK], which rows exist
    x_stride_d,
    y,  # [T, D], any strides
    y_stride_t,  # in elements
    y_stride_d,
    T,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """x y^T as [BLOCK, KEYS] and [BLOCK, KEYS_REST], or TRANSPOSED y x^T as [KEYS, BLOCK], without a second part.

    Keys from T on count as zeros.  With KEYS_REST = 0 the second part means nothing.
    """
    s0 = tl.zeros([KEYS, BLOCK] if TRANSPOSED else [BLOCK, KEYS], ACC)
    s1 = tl.zeros([BLOCK, KEYS_REST if KEYS_REST > 0 else 16], ACC)
    for c in range(CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)
        s0, s1 = _add_products(
            s0, s1, x, x_rows, x_in, x_stride_d, y, y_stride_t, y_stride_d, T, cols,
            D, KEYS, KEYS_REST, TRANSPOSED, DOT, ACC,
        )  # fmt: skip
    if REST > 0:
        cols = CHUNKS * CHUNK + tl.arange(0, REST)
        s0, s1 = _add_products(
            s0, s1, x, x_rows, x_in, x_stride_d, y, y_stride_t, y_stride_d, T, cols,
            D, KEYS, KEYS_REST, TRANSPOSED, DOT, ACC,
        )  # fmt: skip
    return s0, s1


@triton.jit
def _store_weighted_columns(
    w0,
    w1,
    factor,
    y,
    y_stride_t,
    y_stride_d,
    out,
    out_rows,
    out_in,
    T,
    cols,  # int32 [WIDTH], columns to compute
    D: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Some columns of :func:`_store_weighted`, which has the shapes."""
    t = tl.arange(0, KEYS)
    yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
    acc = tl.dot(w0, yc, input_precision="ieee", out_dtype=ACC)
    if KEYS_REST > 0:
        t = KEYS + tl.arange(0, KEYS_REST)
        yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
        acc = tl.dot(w1, yc, acc, input_precision="ieee", out_dtype=ACC)
    store_columns(acc * factor[:, None], out, out_rows, out_in, cols, D)


@triton.jit
def _store_weighted(
    w0,  # [BLOCK, KEYS], weights of the first keys
    w1,  # [BLOCK, KEYS_REST], of the others
    factor,  # [BLOCK], of each row
    y,  # [T, D], any strides
    y_stride_t,  # in elements
    y_stride_d,
    out,  # [BLOCK, D], rows of D neighbours: first row of this tile
    out_rows,  # int32 [BLOCK], offsets of the rows in elements
    out_in,  # bool [BLOCK], which rows exist
    T,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = factor * ([w0 w1] y), a chunk of the columns at a time: registers hold one chunk however wide a head is."""
    # Rounded to the type of the input as a tensor-core operand must be, also where DOT is wider (interpreter).
    w0 = w0.to(y.dtype.element_ty).to(DOT)
    w1 = w1.to(y.dtype.element_ty).to(DOT)
    for c in range(CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)
        _store_weighted_columns(
            w0, w1, factor, y, y_stride_t, y_stride_d, out, out_rows, out_in, T, cols, D, KEYS, KEYS_REST, DOT, ACC
        )
    if REST > 0:
        cols = CHUNKS * CHUNK + tl.arange(0, REST)
        _store_weighted_columns(
            w0, w1, factor, y, y_stride_t, y_stride_d, out, out_rows, out_in, T, cols, D, KEYS, KEYS_REST, DOT, ACC
        )


@triton.jit
def scale_products(s0, s1, scale_log2, T, KEYS: tl.constexpr, KEYS_REST: tl.constexpr):
    """Scaled products [BLOCK, KEYS] and [BLOCK, KEYS_REST], -inf for keys that do not exist."""
    s0 = s0 * scale_log2
    if KEYS_REST > 0:
        # There are more than KEYS keys: the first part is full.
        s1 = tl.where((KEYS + tl.arange(0, KEYS_REST) < T)[None, :], s1 * scale_log2, -float("inf"))
    else:
        s0 = tl.where((tl.arange(0, KEYS) < T)[None, :], s0, -float("inf"))
    return s0, s1


@triton.jit
def chosen_keys(low, high, first, KEYS: tl.constexpr):
    """Which of the keys first .. first + KEYS - 1 are chosen, int32 [KEYS] of 0 and 1: bits of two 64-bit words."""
    t = first + tl.arange(0, KEYS)
    word = tl.where(t < 64, low.to(tl.int64), high.to(tl.int64))
    return ((word >> (t & 63).to(tl.int64)) & 1).to(tl.int32)


@triton.jit
def store_maps(
    map0,  # [BLOCK, KEYS], sums over heads for the first keys
    map1,  # [BLOCK, KEYS_REST], for the others; anything without them
    share,  # factor of the sums
    maps,  # [BLOCK, M] contiguous: first row of this tile
    rows,  # int32 [BLOCK]
    rows_in,  # bool [BLOCK], which rows exist
    low,  # chosen keys 0 .. 63, one bit each
    high,  # chosen keys 64 .. 127
    M,  # how many are chosen
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
):
    """The columns of the chosen keys side by side."""
    map_rows = (rows * M)[:, None]
    chosen0 = chosen_keys(low, high, 0, KEYS)
    slots = tl.cumsum(chosen0, 0) - 1
    tl.store(maps + (map_rows + slots[None, :]), map0 * share, mask=rows_in[:, None] & (chosen0 > 0)[None, :])
    if KEYS_REST > 0:
        chosen1 = chosen_keys(low, high, KEYS, KEYS_REST)
        slots = tl.sum(chosen0, 0) + tl.cumsum(chosen1, 0) - 1
        tl.store(maps + (map_rows + slots[None, :]), map1 * share, mask=rows_in[:, None] & (chosen1 > 0)[None, :])


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_n", "k_stride_b", "k_stride_h", "k_stride_t",
        "v_stride_b", "v_stride_h", "v_stride_t", "scale_log2", "sink", "low", "high", "M", "H", "N", "T", "repeats",
        "heads",
    ]
)  # fmt: skip
def forward_kernel(
    q,  # [B, H, N, D], strides below
    k,  # [B / repeats, H, T, D], strides below
    v,  # [B / repeats, H, T, D], strides below
    out,  # [B, N, H, D] contiguous
    maps,  # [head groups, B, N, M] contiguous, M > 0 only with MAPS
    q_stride_b: tl.int64,  # all strides but those of D in units of VECTOR elements
    q_stride_h: tl.int64,
    q_stride_n: tl.int32,
    q_stride_d,
    k_stride_b: tl.int64,
    k_stride_h: tl.int64,
    k_stride_t: tl.int32,
    k_stride_d,
    v_stride_b: tl.int64,
    v_stride_h: tl.int64,
    v_stride_t: tl.int32,
    v_stride_d,
    scale_log2,  # scale * log2(e): the exponentials are of base two
    sink,  # keys with logit 0 and value 0 that are not stored
    low: tl.int64,  # chosen keys 0 .. 63, one bit each
    high: tl.int64,  # chosen keys 64 .. 127
    M,
    H,
    N,
    T,
    repeats,
    heads,  # heads of one program, 1 without MAPS
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    VECTOR: tl.constexpr,
    MAPS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (head group + groups * query tile, batch row).

    Neighbouring programs share rows of q and out, which hold all heads side by side, so their requests to the memory
    meet in the same pages and sectors.
    """
    groups = tl.cdiv(H, heads)
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    b = tl.program_id(1).to(tl.int64)
    key_b = b // repeats
    start = tile.to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    rows_in = rows < N - tile * BLOCK
    if MAPS:
        map0 = tl.zeros([BLOCK, KEYS], ACC)
        if KEYS_REST > 0:
            map1 = tl.zeros([BLOCK, KEYS_REST], ACC)
    # Without maps one turn, of which the compiler must not know: see the top of this file.
    for turn in tl.range(0, tl.minimum(heads, H - group * heads), disable_licm=True):
        h = (group * heads + turn).to(tl.int64)
        s0, s1 = products(
            q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR, rows * (q_stride_n * VECTOR), rows_in,
            q_stride_d,
            k + (key_b * k_stride_b + h * k_stride_h) * VECTOR, k_stride_t * VECTOR, k_stride_d, T,
            D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, False, DOT, ACC,
        )  # fmt: skip
        s0, s1 = scale_products(s0, s1, scale_log2, T, KEYS, KEYS_REST)
        peak = tl.max(s0, 1)
        if KEYS_REST > 0:
            peak = tl.maximum(peak, tl.max(s1, 1))
        peak = tl.where(sink > 0, tl.maximum(peak, 0.0), peak)
        p0 = tl.exp2(s0 - peak[:, None])
        # With a sink peak >= 0; without, 2 ** -peak may be infinite.
        total = tl.sum(p0, 1) + sink * tl.exp2(-tl.maximum(peak, 0.0))
        p1 = s1
        if KEYS_REST > 0:
            p1 = tl.exp2(s1 - peak[:, None])
            total += tl.sum(p1, 1)
        inverse = 1.0 / total
        _store_weighted(
            p0, p1, inverse,
            v + (key_b * v_stride_b + h * v_stride_h) * VECTOR, v_stride_t * VECTOR, v_stride_d,
            out + (b * N + start) * (H * D) + h * D, rows * (H * D), rows_in, T,
            D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, DOT, ACC,
        )  # fmt: skip
        if MAPS:
            map0 += p0 * inverse[:, None]
            if KEYS_REST > 0:
                map1 += p1 * inverse[:, None]
    if MAPS:
        if KEYS_REST == 0:
            map1 = map0
        target = maps + ((group * tl.num_programs(1) + b) * N + start) * M
        store_maps(map0, map1, 1.0 / H.to(ACC), target, rows, rows_in, low, high, M, KEYS, KEYS_REST)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_n", "k_stride_b", "k_stride_h", "k_stride_t",
        "v_stride_b", "v_stride_h", "v_stride_t", "go_stride_b", "go_stride_h", "go_stride_n",
        "gm_stride_b", "gm_stride_n", "gm_stride_m", "scale", "scale_log2", "sink", "low", "high", "H", "N", "T",
        "repeats",
    ]
)  # fmt: skip
def backward_q_kernel(
    grad_out,  # [B, H, N, D], strides below, only with OUT
    grad_maps,  # [B, N, M], strides below, only with MAPS
    q,  # [B, H, N, D], strides below
    k,  # [B / repeats, H, T, D], strides below
    v,  # [B / repeats, H, T, D], strides below
    statistics,  # [3, B, H, N] contiguous, written: base-2 peak, 1 / denominator, sum over the keys of P dP
    dq,  # [B, N, H, D] contiguous, written only with DQ
    go_stride_b: tl.int64,  # strides of q, k, v and grad_out but those of D in units of VECTOR elements
    go_stride_h: tl.int64,
    go_stride_n: tl.int32,
    go_stride_d,
    gm_stride_b: tl.int64,
    gm_stride_n: tl.int32,
    gm_stride_m: tl.int32,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    q_stride_n: tl.int32,
    q_stride_d,
    k_stride_b: tl.int64,
    k_stride_h: tl.int64,
    k_stride_t: tl.int32,
    k_stride_d,
    v_stride_b: tl.int64,
    v_stride_h: tl.int64,
    v_stride_t: tl.int32,
    v_stride_d,
    scale,
    scale_log2,
    sink,
    low: tl.int64,
    high: tl.int64,
    H,
    N,
    T,
    repeats,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    VECTOR: tl.constexpr,
    OUT: tl.constexpr,
    MAPS: tl.constexpr,
    DQ: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (head + H * query tile, batch row)."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b = tl.program_id(1).to(tl.int64)
    key_b = b // repeats
    start = tile.to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    rows_in = rows < N - tile * BLOCK
    for _ in tl.range(0, 1 if MAPS else tl.minimum(H, 1), disable_licm=True):  # one turn: see the top of this file
        k_head = k + (key_b * k_stride_b + h * k_stride_h) * VECTOR
        s0, s1 = products(
            q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR, rows * (q_stride_n * VECTOR), rows_in,
            q_stride_d, k_head, k_stride_t * VECTOR, k_stride_d, T,
            D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, False, DOT, ACC,
        )  # fmt: skip
        if OUT:
            dp0, dp1 = products(
                grad_out + (b * go_stride_b + h * go_stride_h + start * go_stride_n) * VECTOR,
                rows * (go_stride_n * VECTOR), rows_in, go_stride_d,
                v + (key_b * v_stride_b + h * v_stride_h) * VECTOR, v_stride_t * VECTOR, v_stride_d, T,
                D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, False, DOT, ACC,
            )  # fmt: skip
        else:
            dp0 = tl.zeros([BLOCK, KEYS], ACC)
            dp1 = tl.zeros([BLOCK, KEYS_REST if KEYS_REST > 0 else 16], ACC)
        if MAPS:
            share = 1.0 / H.to(ACC)
            source = grad_maps + (b * gm_stride_b + start * gm_stride_n)
            map_rows = (rows * gm_stride_n)[:, None]
            chosen0 = chosen_keys(low, high, 0, KEYS)
            slots = tl.cumsum(chosen0, 0) - 1
            mask = rows_in[:, None] & (chosen0 > 0)[None, :]
            dp0 += tl.load(source + (map_rows + (slots * gm_stride_m)[None, :]), mask=mask, other=0.0).to(ACC) * share
            if KEYS_REST > 0:
                chosen1 = chosen_keys(low, high, KEYS, KEYS_REST)
                slots = tl.sum(chosen0, 0) + tl.cumsum(chosen1, 0) - 1
                mask = rows_in[:, None] & (chosen1 > 0)[None, :]
                dp1 += (
                    tl.load(source + (map_rows + (slots * gm_stride_m)[None, :]), mask=mask, other=0.0).to(ACC) * share
                )
        s0, s1 = scale_products(s0, s1, scale_log2, T, KEYS, KEYS_REST)
        peak = tl.max(s0, 1)
        if KEYS_REST > 0:
            peak = tl.maximum(peak, tl.max(s1, 1))
        peak = tl.where(sink > 0, tl.maximum(peak, 0.0), peak)
        p0 = tl.exp2(s0 - peak[:, None])
        total = tl.sum(p0, 1) + sink * tl.exp2(-tl.maximum(peak, 0.0))
        p1 = s1
        if KEYS_REST > 0:
            p1 = tl.exp2(s1 - peak[:, None])
            total += tl.sum(p1, 1)
        inverse = 1.0 / total
        p0 *= inverse[:, None]
        dot = tl.sum(p0 * dp0, 1)
        if KEYS_REST > 0:
            p1 *= inverse[:, None]
            dot += tl.sum(p1 * dp1, 1)
        target = statistics + ((b * H + h) * N + start) + rows
        plane = tl.num_programs(1).to(tl.int64) * H * N
        tl.store(target, peak, mask=rows_in)
        tl.store(target + plane, inverse, mask=rows_in)
        tl.store(target + 2 * plane, dot, mask=rows_in)
        if DQ:
            _store_weighted(
                p0 * (dp0 - dot[:, None]), p1 * (dp1 - dot[:, None]), tl.full([BLOCK], 1.0, ACC) * scale,
                k_head, k_stride_t * VECTOR, k_stride_d,
                dq + (b * N + start) * (H * D) + h * D, rows * (H * D), rows_in, T,
                D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, DOT, ACC,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_n", "k_stride_b", "k_stride_h", "k_stride_t",
        "v_stride_b", "v_stride_h", "v_stride_t", "go_stride_b", "go_stride_h", "go_stride_n",
        "gm_stride_b", "gm_stride_n", "gm_stride_m", "scale", "scale_log2", "low", "high", "H", "N", "T", "repeats",
        "split_rows",
    ]
)  # fmt: skip
def backward_kv_kernel(
    grad_out,  # [B, H, N, D], strides below, only with OUT
    grad_maps,  # [B, N, M], strides below, only with MAPS
    q,  # [B, H, N, D], strides below
    k,  # [B / repeats, H, T, D], strides below
    v,  # [B / repeats, H, T, D], strides below
    statistics,  # [3, B, H, N] contiguous, of the kernel above
    dk,  # [splits, B / repeats, H, T, D] contiguous, written
    dv,  # [splits, B / repeats, H, T, D] contiguous, written only with OUT
    go_stride_b: tl.int64,  # strides of q, k, v and grad_out but those of D in units of VECTOR elements
    go_stride_h: tl.int64,
    go_stride_n: tl.int32,
    go_stride_d,
    gm_stride_b: tl.int64,
    gm_stride_n: tl.int32,
    gm_stride_m: tl.int32,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    q_stride_n: tl.int32,
    q_stride_d,
    k_stride_b: tl.int64,
    k_stride_h: tl.int64,
    k_stride_t: tl.int32,
    k_stride_d,
    v_stride_b: tl.int64,
    v_stride_h: tl.int64,
    v_stride_t: tl.int32,
    v_stride_d,
    scale,
    scale_log2,
    low: tl.int64,
    high: tl.int64,
    H,
    N,
    T,
    repeats,
    split_rows,  # queries of one split
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
    VECTOR: tl.constexpr,
    OUT: tl.constexpr,
    MAPS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (key tile + key tiles * (part + parts * split), head, key batch): dK and dV of KEYS keys, summed over the
    queries of the split in the ``repeats`` batch rows that share these keys.

    With WIDTH_REST there is one part of WIDTH + WIDTH_REST columns; without, parts of WIDTH columns each.

    Scores are computed with keys as rows, [KEYS, BLOCK]: in this orientation they are the left operands of the products
    with q and grad_out as they are, without a transposition through shared memory.
    """
    key_tiles = tl.cdiv(T, KEYS)
    key_tile = tl.program_id(0) % key_tiles
    parts = 1 if WIDTH_REST > 0 else tl.cdiv(D, WIDTH)
    part = tl.program_id(0) // key_tiles % parts
    split = tl.program_id(0) // (key_tiles * parts)
    h = tl.program_id(1).to(tl.int64)
    key_batches = tl.num_programs(2).to(tl.int64)
    key_b = tl.program_id(2).to(tl.int64)
    key_start = key_tile.to(tl.int64) * KEYS
    n_keys = T - key_tile * KEYS
    k_tile = k + (key_b * k_stride_b + h * k_stride_h + key_start * k_stride_t) * VECTOR
    v_tile = v + (key_b * v_stride_b + h * v_stride_h + key_start * v_stride_t) * VECTOR
    tiles = tl.cdiv(split_rows, BLOCK)
    rows = tl.arange(0, BLOCK)
    plane = key_batches * repeats * H * N
    q_rows = rows * (q_stride_n * VECTOR)
    go_rows = rows * (go_stride_n * VECTOR)
    cols0 = part * WIDTH + tl.arange(0, WIDTH)
    dk0 = tl.zeros([KEYS, WIDTH], ACC)
    dv0 = dk0
    if WIDTH_REST > 0:
        cols1 = WIDTH + tl.arange(0, WIDTH_REST)
        dk1 = tl.zeros([KEYS, WIDTH_REST], ACC)
        dv1 = dk1
    if MAPS:
        share = 1.0 / H.to(ACC)
        # All keys before this tile count for the slots of its own.
        chosen = chosen_keys(low, high, 0, 128)
        before = tl.sum(tl.where(tl.arange(0, 128) < key_tile * KEYS, chosen, 0), 0)
        chosen = chosen_keys(low, high, key_tile * KEYS, KEYS)
        slots = ((before + tl.cumsum(chosen, 0) - 1) * gm_stride_m)[:, None]
    for turn in tl.range(0, repeats * tiles, disable_licm=True):
        b = key_b * repeats + turn // tiles
        offset = (turn % tiles) * BLOCK
        start = split.to(tl.int64) * split_rows + offset
        rows_in = rows < tl.minimum(split_rows - offset, N - start)
        source = statistics + ((b * H + h) * N + start) + rows
        q_tile = q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR
        s, _ = products(
            q_tile, q_rows, rows_in, q_stride_d, k_tile, k_stride_t * VECTOR, k_stride_d, n_keys,
            D, CHUNK, CHUNKS, REST, KEYS, 0, BLOCK, True, DOT, ACC,
        )  # fmt: skip
        # Rows past the end get probability 0.  Keys past T get what they like: they are not stored.
        peak = tl.load(source, mask=rows_in, other=0.0)
        inverse = tl.load(source + plane, mask=rows_in, other=0.0)
        dot = tl.load(source + 2 * plane, mask=rows_in, other=0.0)
        p = tl.exp2(s * scale_log2 - peak[None, :]) * inverse[None, :]
        if OUT:
            go_tile = grad_out + (b * go_stride_b + h * go_stride_h + start * go_stride_n) * VECTOR
            dp, _ = products(
                go_tile, go_rows, rows_in, go_stride_d, v_tile, v_stride_t * VECTOR, v_stride_d, n_keys,
                D, CHUNK, CHUNKS, REST, KEYS, 0, BLOCK, True, DOT, ACC,
            )  # fmt: skip
            w = p.to(v.dtype.element_ty).to(DOT)
            go = load_columns(go_tile, go_rows, rows_in, go_stride_d, cols0, D).to(DOT)
            dv0 = tl.dot(w, go, dv0, input_precision="ieee", out_dtype=ACC)
            if WIDTH_REST > 0:
                go = load_columns(go_tile, go_rows, rows_in, go_stride_d, cols1, D).to(DOT)
                dv1 = tl.dot(w, go, dv1, input_precision="ieee", out_dtype=ACC)
        else:
            dp = tl.zeros([KEYS, BLOCK], ACC)
        if MAPS:
            map_tile = grad_maps + (b * gm_stride_b + start * gm_stride_n)
            mask = rows_in[None, :] & (chosen > 0)[:, None]
            dp += tl.load(map_tile + ((rows * gm_stride_n)[None, :] + slots), mask=mask, other=0.0).to(ACC) * share
        w = (p * (dp - dot[None, :])).to(q.dtype.element_ty).to(DOT)
        qc = load_columns(q_tile, q_rows, rows_in, q_stride_d, cols0, D).to(DOT)
        dk0 = tl.dot(w, qc, dk0, input_precision="ieee", out_dtype=ACC)
        if WIDTH_REST > 0:
            qc = load_columns(q_tile, q_rows, rows_in, q_stride_d, cols1, D).to(DOT)
            dk1 = tl.dot(w, qc, dk1, input_precision="ieee", out_dtype=ACC)
    target = (((split * key_batches + key_b) * H + h) * T + key_start) * D
    t = tl.arange(0, KEYS)
    t_in = t < n_keys
    store_columns(dk0 * scale, dk + target, t * D, t_in, cols0, D)
    if OUT:
        store_columns(dv0, dv + target, t * D, t_in, cols0, D)
    if WIDTH_REST > 0:
        store_columns(dk1 * scale, dk + target, t * D, t_in, cols1, D)
        if OUT:
            store_columns(dv1, dv + target, t * D, t_in, cols1, D)


#: Triton's interpreter replaces every kernel at import when TRITON_INTERPRET is set.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def obstacle(q: Tensor, k: Tensor, v: Tensor, maps: bool = True) -> str | None:
    """Why these inputs (shapes and dtypes as in :func:`forward`) cannot run, with maps or without, or None."""
    dtypes = (*DTYPES, torch.float64) if INTERPRETED else DTYPES
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"q, k and v must have one dtype of {names}, got {q.dtype}, {k.dtype} and {v.dtype}"
    if not 1 <= k.shape[2] <= 128 or not 1 <= q.shape[3] <= 256:
        return f"1 to 128 keys and heads of 1 to 256 are supported, got {k.shape[2]} keys and d = {q.shape[3]}"
    if max(q.shape[0], q.shape[1]) > 65535:
        return f"at most 65535 batch rows and heads are supported, got {q.shape[0]} and {q.shape[1]}"
    if INTERPRETED:
        return None
    if q.device.type != "cuda":
        return f"the kernels are for GPUs of NVIDIA and AMD, got tensors on {q.device.type!r}"
    if torch.version.hip is None and _capability(q.device) < 80:
        return f"the kernels need compute capability 8.0, this GPU has {_capability(q.device) / 10}"
    if not maps and torch.version.hip is None and _capability(q.device) // 10 == 9:
        return refuse_on_hopper(q.shape[3], k.shape[2], q.dtype)
    return None


def refuse_on_hopper(d: int, n_keys: int, dtype: torch.dtype) -> str | None:
    """Why the forward kernel without maps may not run on a Hopper GPU for these sizes, or None.

    With d = 160 it made an illegal access on an H100 and an H200 (Triton 3.6), whose cause is not found; with maps, and
    with one chunk of columns, all that were run were right.
    """
    if dtype.itemsize == 2 and tile_sizes(d, n_keys, dtype)["CHUNKS"] > 1:
        return f"heads of d >= 128 without maps have failed on Hopper GPUs, got d = {d}"
    return None


def _capability(device: torch.device) -> int:
    """80, 89, 90, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def partition(size: int, widest: int) -> tuple[int, int, int]:
    """(chunk, how many chunks, rest): powers of two >= 16 that cover ``size`` with the least padding, rest may be 0."""
    chunk = min(widest, max(16, 1 << (size.bit_length() - 1)))
    chunks = max(1, size // chunk)
    left = max(0, size - chunk * chunks)
    rest = max(16, triton.next_power_of_2(left)) if left else 0
    if rest < chunk:
        return chunk, chunks, rest
    return (2 * chunk, 1, 0) if chunk < widest else (chunk, chunks + 1, 0)


def tile_sizes(d: int, n_keys: int, dtype: torch.dtype, widest: int = 64) -> dict:
    """Compile-time arguments that all kernels share; chunks of at most ``widest`` columns."""
    # FMA units keep a whole operand in registers: narrower chunks in float32.
    chunk, chunks, rest = partition(d, 16 if dtype.itemsize == 4 else widest)
    keys, _, keys_rest = partition(n_keys, 128)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    # The interpreter multiplies the bit patterns of bfloat16 operands: it is given the rounded values in float32.
    dot = tl.float32 if INTERPRETED and dtype == torch.bfloat16 else getattr(tl, str(dtype).removeprefix("torch."))
    return {
        "D": d, "CHUNK": chunk, "CHUNKS": chunks, "REST": rest, "KEYS": keys, "KEYS_REST": keys_rest,
        "DOT": dot, "ACC": acc,
    }  # fmt: skip


def forward_launch(d: int, n_keys: int, dtype: torch.dtype, maps: bool) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`forward_kernel`, all but VECTOR."""
    sizes = tile_sizes(d, n_keys, dtype)
    one_chunk = sizes["CHUNKS"] == 1
    if dtype.itemsize == 4:
        block, options = 16, {"num_warps": 8, "num_stages": 2 if one_chunk else 1}
    elif not maps:
        # Tiles of 128 queries halve what the keys and values cost.  AMD's GPUs lack the shared memory for two stages.
        stages = 2 if one_chunk and torch.version.hip is None else 1
        block, options = 128 if one_chunk else 64, {"num_warps": 8, "num_stages": stages}
    else:
        # Sums of maps take as many registers as the scores: of 128 queries 230 in 8 warps, alone on a multiprocessor.
        # So two or three small programs share one, and their columns come in equal chunks without a rest, which takes
        # registers of its own.  Heads wider than 96 are those of the deepest level, which has few queries: 256 in
        # SD1.5.
        sizes = tile_sizes(d, n_keys, dtype, math.gcd(triton.cdiv(d, 16) * 16, 64 if d <= 64 else 32))
        block = 16 if d > 96 else 64 if sizes["KEYS"] <= 64 else 32
        options = {"num_warps": 4, "num_stages": 1}
    return {**sizes, "MAPS": maps, "BLOCK": block}, options


def backward_q_launch(d: int, n_keys: int, dtype: torch.dtype, out: bool, maps: bool) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`backward_q_kernel`, all but VECTOR and DQ."""
    # With maps registers are scarce, and a rest costs more of them than more turns of a loop.
    sizes = tile_sizes(d, n_keys, dtype, 16 if maps and 64 < d <= 80 else 64)
    block = 32 if maps or dtype.itemsize == 4 or n_keys < 64 else 64
    # A second stage keeps clear of the assembler's bug (see the top); AMD's lacks it, and the shared memory for it.
    pipelined = not maps and dtype.itemsize == 2 and torch.version.hip is None
    options = {"num_warps": 8, "num_stages": 2 if pipelined else 1}
    if pipelined or dtype.itemsize == 4:
        # Left alone, ptxas stops at 128 registers and spills two.
        options |= registers(224 if pipelined and (n_keys > 96 or d > 128) else 168)
    return {**sizes, "OUT": out, "MAPS": maps, "BLOCK": block}, options


def backward_kv_launch(d: int, n_keys: int, dtype: torch.dtype, out: bool, maps: bool) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`backward_kv_kernel`, all but VECTOR."""
    sizes = tile_sizes(d, n_keys, dtype)
    # 77 keys are three tiles of 32: two of 64 would compute a third more.
    padded = triton.next_power_of_2(max(16, n_keys))
    keys = min(padded, 32 if dtype.itemsize == 4 or d > 160 or 64 < n_keys <= 96 else 64)
    # Narrow heads in one part; of wide ones a program sums a part only and computes the scores anew for it.
    width, parts, width_rest = partition(d, 32 if dtype.itemsize == 4 else 64)
    if parts > 1 or dtype.itemsize == 4:
        width_rest = 0
    sizes = {name: size for name, size in sizes.items() if name != "KEYS_REST"} | {"KEYS": keys}
    options = {"num_warps": 4 if dtype.itemsize == 4 else 8, "num_stages": 2 if sizes["CHUNKS"] == 1 else 1}
    block = 64 if d <= 64 and dtype.itemsize == 2 and not maps else 32
    widths = {"WIDTH": width, "WIDTH_REST": width_rest}
    return {**sizes, **widths, "OUT": out, "MAPS": maps, "BLOCK": block}, options


def near(x: Tensor) -> Tensor:
    """x, copied if the elements of one tile lie further apart than the 32-bit offsets within a tile reach."""
    reach = sum(min(size, 256) * stride for size, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True))
    return x if reach < 2**31 else x.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """Elements, a power of two of at most 16 bytes, that all strides but unit ones are multiples of."""
    common = 16 // tensors[0].element_size()
    for x in tensors:
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            common = math.gcd(common, stride if size > 1 else 0)
        if x.stride(3) != 1 and x.shape[3] > 1:
            common = 1
    return common


def strides_in(x: Tensor, vector: int) -> tuple[int, int, int, int]:
    b, h, n, d = (stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    return b // vector, h // vector, n // vector, 1 if x.shape[3] == 1 else d


def head_groups(batch: int, heads: int, queries: int) -> int:
    """Heads of one program that writes maps: all, unless too few programs would be left to fill a large GPU.

    It depends on the problem alone, so that a map is the same sum in the same order on every machine.
    """
    programs = max(1, batch * triton.cdiv(queries, 64))
    return triton.cdiv(heads, min(heads, triton.cdiv(256, programs)))


def _split_rows(programs: int, queries: int) -> int:
    """Queries that one program of the dK, dV kernel sums; a multiple of 128 unless it is all of them.

    It depends on the problem alone: the same sum in the same order on every machine.
    """
    splits = min(triton.cdiv(512, programs), queries // 256)
    if splits <= 1:
        return queries
    return triton.cdiv(triton.cdiv(queries, splits), 128) * 128


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sink: int, map_tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, N, d] over k, v [B / r, H, T, d].

    Args:
        scale: factor of the logits.
        sink: keys with logit 0 and value 0 that are not stored.
        map_tokens: strictly increasing positions of the keys whose probabilities are wanted.

    Returns:
        out [B, H, N, d] stored as a contiguous [B, N, H, d]; maps [B, N, len(map_tokens)], the mean of the
        probabilities over the heads, in float32, or float64 for float64 inputs.
    """
    (batch, heads, queries, d), n_keys, n_maps = q.shape, k.shape[2], len(map_tokens)
    q, k, v = near(q), near(k), near(v)
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty([batch, queries, heads, d])
    group = head_groups(batch, heads, queries) if n_maps and queries else 1
    groups = triton.cdiv(heads, group)
    maps = q.new_empty([groups if n_maps else 1, batch, queries, n_maps], dtype=precise)
    if out.numel():
        constants, options = forward_launch(d, n_keys, q.dtype, n_maps > 0)
        vector = stride_unit(q, k, v)
        with on_device_of(q):
            forward_kernel[(triton.cdiv(queries, constants["BLOCK"]) * groups, batch)](
                q, k, v, out, maps,
                *strides_in(q, vector), *strides_in(k, vector), *strides_in(v, vector),
                scale * LOG2_E.value, sink, *bits(map_tokens), n_maps, heads, queries, n_keys, batch // k.shape[0],
                group, VECTOR=vector, **constants, **options,
            )  # fmt: skip
    return out.transpose(1, 2), summed(maps)


def backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sink: int,
    map_tokens: Sequence[int],
    need_q: bool = True,
    need_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` for q, k and v, in their dtypes; dq is stored as out is.

    Args:
        grad_out: [B, H, N, d], any strides, or None for zeros: then nothing about v is computed and dv is zeros.
        grad_maps: [B, N, len(map_tokens)], any strides, or None for zeros.
        need_q: False returns no elements for dq.
        need_kv: False returns no elements for dk and dv and skips their kernel.

    The probabilities are made anew: all keys of a query fit one tile, which makes that cheap, and with a rounded
    logarithm of the denominator float32 gradients are less exact.
    """
    (batch, heads, queries, d), n_keys, key_batch = q.shape, k.shape[2], k.shape[0]
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    with_out, with_maps = grad_out is not None, grad_maps is not None and len(map_tokens) > 0
    if not (with_out or with_maps) or q.numel() == 0:
        dq = q.new_zeros([batch, queries, heads, d]).transpose(1, 2) if need_q else q.new_empty(0)
        return dq, *((x.new_zeros(x.shape) if need_kv else x.new_empty(0)) for x in (k, v))
    q, k, v = near(q), near(k), near(v)
    grad_out = near(grad_out) if with_out else None
    grad_maps = near(grad_maps) if with_maps else None
    vector = stride_unit(q, k, v, grad_out) if with_out else stride_unit(q, k, v)
    dq = q.new_empty([batch, queries, heads, d]).transpose(1, 2) if need_q else q.new_empty(0)
    statistics = q.new_empty([3, batch, heads, queries], dtype=precise)
    strides = (
        *(strides_in(grad_out, vector) if with_out else (0, 0, 0, 1)),
        *(grad_maps.stride() if with_maps else (0, 0, 0)),
        *strides_in(q, vector), *strides_in(k, vector), *strides_in(v, vector),
    )  # fmt: skip
    # A pointer that a kernel does not follow: an operand that is there anyway.
    inputs = (grad_out if with_out else q, grad_maps if with_maps else statistics, q, k, v, statistics)
    scales = (scale, scale * LOG2_E.value)
    rest = (*bits(map_tokens), heads, queries, n_keys, batch // key_batch)
    with on_device_of(q):
        constants, options = backward_q_launch(d, n_keys, q.dtype, with_out, with_maps)
        backward_q_kernel[(triton.cdiv(queries, constants["BLOCK"]) * heads, batch)](
            *inputs, dq if need_q else q, *strides, *scales, sink, *rest,
            VECTOR=vector, DQ=need_q, **constants, **options,
        )  # fmt: skip
        if not need_kv:
            return dq, k.new_empty(0), v.new_empty(0)
        constants, options = backward_kv_launch(d, n_keys, q.dtype, with_out, with_maps)
        key_tiles = triton.cdiv(n_keys, constants["KEYS"])
        parts = 1 if constants["WIDTH_REST"] else triton.cdiv(d, constants["WIDTH"])
        split_rows = _split_rows(key_batch * heads * triton.cdiv(n_keys, 32), queries)
        splits = triton.cdiv(queries, split_rows)
        partial = k.dtype if splits == 1 else precise
        dk = k.new_empty([splits, *k.shape], dtype=partial)
        dv = v.new_empty([splits, *v.shape], dtype=partial) if with_out else None
        backward_kv_kernel[(key_tiles * parts * splits, heads, key_batch)](
            *inputs, dk, dv if with_out else dk, *strides, *scales, *rest, split_rows,
            VECTOR=vector, **constants, **options,
        )  # fmt: skip
    dk = summed(dk).to(k.dtype)
    dv = summed(dv).to(v.dtype) if with_out else v.new_zeros(v.shape)
    return dq, dk, dv


def summed(parts: Tensor) -> Tensor:
    """parts [n, ...] summed over n, without a launch when there is one."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def aot_cases(capability: int, quick: bool = False) -> Iterator[tuple]:
    """Every launch, as the functions above make it, for an ahead-of-time compiler.

    Yields:
        (name, kernel, signature, compile-time arguments, compiler options); a ``:16`` after a type means a multiple of
        16, as in Triton's own tools.
    """
    shapes = (
        [(40, 77), (64, 77), (160, 77)] if quick else [(40, 77), (64, 77), (64, 128), (80, 77), (160, 77), (256, 128)]
    )
    for dtype in DTYPES[:1] if quick else DTYPES:
        for d, n_keys in shapes:
            arguments = (d, n_keys, dtype)
            launches = []
            for maps in (False, True):
                label = "maps" if maps else "plain"
                constants, options = forward_launch(*arguments, maps)
                launches.append((f"forward {label}", forward_kernel, constants, options))
                # With grad_out: what the kernels without it do, they do too.
                constants, options = backward_q_launch(*arguments, True, maps)
                constants |= {"DQ": True}
                launches.append((f"backward_q {label}", backward_q_kernel, constants, options))
                constants, options = backward_kv_launch(*arguments, True, maps)
                launches.append((f"backward_kv {label}", backward_kv_kernel, constants, options))
            for name, kernel, constants, options in launches:
                constants = {**constants, "VECTOR": math.gcd(d, 16 // dtype.itemsize)}
                signature = _signature(kernel, constants, dtype)
                constants |= {name: 1 for name in kernel.arg_names if name.endswith("_stride_d")}
                yield f"{name} {NAMES[dtype]} d={d} T={n_keys}", kernel, signature, constants, options


def _signature(kernel: triton.JITFunction, constants: dict, dtype: torch.dtype) -> dict[str, str]:
    """Types of a kernel's arguments for contiguous inputs."""
    pointers = dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), f"*{NAMES[dtype]}:16")
    pointers |= dict.fromkeys(("maps", "grad_maps", "statistics"), "*fp32:16")
    scalars = (
        dict.fromkeys(("scale", "scale_log2"), "fp32")
        | dict.fromkeys(("low", "high"), "i64")
        | dict.fromkeys(("gm_stride_n", "gm_stride_m"), "i32")
        | dict.fromkeys(("q_stride_n", "k_stride_t", "v_stride_t", "go_stride_n"), "i32")
    )

    def type_of(name: str) -> str:
        if name in constants or name.endswith("_stride_d"):
            return "constexpr"
        return pointers.get(name) or scalars.get(name) or ("i64" if "_stride_" in name else "i32")

    return {name: type_of(name) for name in kernel.arg_names}
