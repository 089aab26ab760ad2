"""The sum of two cross attentions over at most 128 keys each, in one pass over the queries.

Shapes: source_q, q [B, H, N, d], source_k, first [B / r, H, Ts, d], k, second [B / r, H, T, d], any strides.  The
operator's definition is in ``difffast/ops/edited_attention.py``; how heads and keys are cut into tiles, and strides
passed, in ``attention_tiles.py``.  Both maps are normalised before their values, so that one sum serves both.
"""

# Constants and sizes in kernels are upper case, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_tiles
from .attention_tiles import (
    DTYPES,
    LOG2_E,
    NAMES,
    load_columns,
    near,
    partition,
    products,
    scale_products,
    store_columns,
    stride_unit,
    strides_in,
    tile_sizes,
)
from .launch import ROUND_PRODUCTS, on_device_of, registers


@triton.jit
def _attend(
    q,  # first row of this tile
    q_rows,  # int32 [BLOCK], offsets of the rows in elements
    q_in,  # bool [BLOCK], which rows exist
    q_stride_d,
    k,  # [T, D], any strides
    k_stride_t,  # in elements
    k_stride_d,
    T,
    scale_log2,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The map of a tile of queries, [BLOCK, KEYS] and [BLOCK, KEYS_REST]; with KEYS_REST = 0 the latter is anything."""
    s0, s1 = products(
        q, q_rows, q_in, q_stride_d, k, k_stride_t, k_stride_d, T,
        D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, False, DOT, ACC,
    )  # fmt: skip
    s0, s1 = scale_products(s0, s1, scale_log2, T, KEYS, KEYS_REST)
    peak = tl.max(s0, 1)
    if KEYS_REST > 0:
        peak = tl.maximum(peak, tl.max(s1, 1))
    p0 = tl.exp2(s0 - peak[:, None])
    total = tl.sum(p0, 1)
    p1 = s1
    if KEYS_REST > 0:
        p1 = tl.exp2(s1 - peak[:, None])
        total += tl.sum(p1, 1)
    inverse = 1.0 / total
    # Rounded to the type of the input as a tensor-core operand must be, also where DOT is wider (interpreter).
    w0 = (p0 * inverse[:, None]).to(k.dtype.element_ty).to(DOT)
    w1 = (p1 * inverse[:, None]).to(k.dtype.element_ty).to(DOT)
    return w0, w1


@triton.jit
def _add_weighted(
    acc,  # [BLOCK, columns], sum so far
    w0,  # [BLOCK, KEYS], a map
    w1,  # [BLOCK, KEYS_REST], of the other keys
    y,  # [T, D], any strides
    y_stride_t,  # in elements
    y_stride_d,
    T,
    cols,  # int32 [columns]
    D: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """acc plus some columns of [w0 w1] y."""
    t = tl.arange(0, KEYS)
    yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
    acc = tl.dot(w0, yc, acc, input_precision="ieee", out_dtype=ACC)
    if KEYS_REST > 0:
        t = KEYS + tl.arange(0, KEYS_REST)
        yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
        acc = tl.dot(w1, yc, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit(
    do_not_specialize=[
        "sq_stride_b", "sq_stride_h", "sq_stride_n", "sk_stride_b", "sk_stride_h", "sk_stride_t",
        "sv_stride_b", "sv_stride_h", "sv_stride_t", "q_stride_b", "q_stride_h", "q_stride_n",
        "k_stride_b", "k_stride_h", "k_stride_t", "v_stride_b", "v_stride_h", "v_stride_t",
        "scale_log2", "H", "N", "S", "T", "repeats",
    ]
)  # fmt: skip
def forward_kernel(
    source_q,  # [B, H, N, D], strides below
    source_k,  # [B / repeats, H, S, D]
    first,  # [B / repeats, H, S, D]
    q,  # [B, H, N, D]
    k,  # [B / repeats, H, T, D]
    second,  # [B / repeats, H, T, D]
    out,  # [B, N, H, D] contiguous
    sq_stride_b: tl.int64,  # all strides but those of D in units of VECTOR elements
    sq_stride_h: tl.int64,
    sq_stride_n: tl.int32,
    sq_stride_d,
    sk_stride_b: tl.int64,
    sk_stride_h: tl.int64,
    sk_stride_t: tl.int32,
    sk_stride_d,
    sv_stride_b: tl.int64,
    sv_stride_h: tl.int64,
    sv_stride_t: tl.int32,
    sv_stride_d,
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
    scale_log2,  # scale * log2(e): the exponentials are of base two
    H,
    N,
    S,
    T,
    repeats,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    SOURCE_KEYS: tl.constexpr,
    SOURCE_REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    VECTOR: tl.constexpr,
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
    a0, a1 = _attend(
        source_q + (b * sq_stride_b + h * sq_stride_h + start * sq_stride_n) * VECTOR, rows * (sq_stride_n * VECTOR),
        rows_in, sq_stride_d,
        source_k + (key_b * sk_stride_b + h * sk_stride_h) * VECTOR, sk_stride_t * VECTOR, sk_stride_d,
        S, scale_log2, D, CHUNK, CHUNKS, REST, SOURCE_KEYS, SOURCE_REST, BLOCK, DOT, ACC,
    )  # fmt: skip
    w0, w1 = _attend(
        q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR, rows * (q_stride_n * VECTOR),
        rows_in, q_stride_d,
        k + (key_b * k_stride_b + h * k_stride_h) * VECTOR, k_stride_t * VECTOR, k_stride_d,
        T, scale_log2, D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, DOT, ACC,
    )  # fmt: skip
    first += (key_b * sv_stride_b + h * sv_stride_h) * VECTOR
    second += (key_b * v_stride_b + h * v_stride_h) * VECTOR
    out += (b * N + start) * (H * D) + h * D
    # A chunk of the columns at a time: registers hold one chunk however wide a head is.
    for c in range(CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)
        acc = tl.zeros([BLOCK, CHUNK], ACC)
        acc = _add_weighted(
            acc, a0, a1, first, sv_stride_t * VECTOR, sv_stride_d, S, cols, D, SOURCE_KEYS, SOURCE_REST, DOT, ACC
        )
        acc = _add_weighted(acc, w0, w1, second, v_stride_t * VECTOR, v_stride_d, T, cols, D, KEYS, KEYS_REST, DOT, ACC)
        store_columns(acc, out, rows * (H * D), rows_in, cols, D)
    if REST > 0:
        cols = CHUNKS * CHUNK + tl.arange(0, REST)
        acc = tl.zeros([BLOCK, REST], ACC)
        acc = _add_weighted(
            acc, a0, a1, first, sv_stride_t * VECTOR, sv_stride_d, S, cols, D, SOURCE_KEYS, SOURCE_REST, DOT, ACC
        )
        acc = _add_weighted(acc, w0, w1, second, v_stride_t * VECTOR, v_stride_d, T, cols, D, KEYS, KEYS_REST, DOT, ACC)
        store_columns(acc, out, rows * (H * D), rows_in, cols, D)


def obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why inputs with these shapes and dtypes, of :func:`forward`, cannot run, or None."""
    return attention_tiles.obstacle(q, k, k, False) or attention_tiles.obstacle(q, v, v, False)


def forward_launch(d: int, n_source: int, n_keys: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`forward_kernel`, all but VECTOR."""
    exact = dtype.itemsize >= 4
    # Equal chunks: a rest would take registers of its own, of which the two maps leave few.
    sizes = tile_sizes(d, n_keys, dtype, math.gcd(triton.cdiv(d, 16) * 16, 64 if d <= 64 else 32))
    source, _, source_rest = partition(n_source, 128)
    # From 64 rows on products are wgmma's, for which the assembler has a bug (see the top of attention_tiles.py).
    tiles = {"SOURCE_KEYS": source, "SOURCE_REST": source_rest, "BLOCK": 16 if exact else 32}
    options = {"num_warps": 8 if exact else 4, "num_stages": 1, **ROUND_PRODUCTS}
    # Left alone, ptxas stops at 128 registers and spills two; of 168 it spills as many for wide heads.
    return {**sizes, **tiles}, options | registers(224) if exact else options


def forward(
    source_q: Tensor, source_k: Tensor, first: Tensor, q: Tensor, k: Tensor, second: Tensor, scale: float
) -> Tensor:
    """Attention of source_q [B, H, N, d] to source_k, first [B / r, H, Ts, d] plus that of q to k, second.

    Returns:
        out [B, H, N, d] stored as a contiguous [B, N, H, d].
    """
    (batch, heads, queries, d), n_source, n_keys = q.shape, source_k.shape[2], k.shape[2]
    operands = tuple(near(x) for x in (source_q, source_k, first, q, k, second))
    out = q.new_empty([batch, queries, heads, d])
    if out.numel():
        constants, options = forward_launch(d, n_source, n_keys, q.dtype)
        vector = stride_unit(*operands)
        with on_device_of(q):
            forward_kernel[(triton.cdiv(queries, constants["BLOCK"]) * heads, batch)](
                *operands, out, *(stride for x in operands for stride in strides_in(x, vector)),
                scale * LOG2_E.value, heads, queries, n_source, n_keys, batch // k.shape[0],
                VECTOR=vector, **constants, **options,
            )  # fmt: skip
    return out.transpose(1, 2)


def aot_cases(capability: int, quick: bool = False) -> Iterator[tuple]:
    """Every launch, as the function above makes it, for an ahead-of-time compiler.

    Yields:
        (name, kernel, signature, compile-time arguments, compiler options); a ``:16`` after a type means a multiple of
        16, as in Triton's own tools.
    """
    for dtype in DTYPES[:1] if quick else DTYPES:
        for d, n_keys in [(64, 77)] if quick else [(8, 1), (40, 77), (64, 77), (80, 77), (160, 77), (128, 128)]:
            constants, options = forward_launch(d, n_keys, n_keys, dtype)
            constants["VECTOR"] = math.gcd(d, 16 // dtype.itemsize)
            types = dict.fromkeys(
                ("source_q", "source_k", "first", "q", "k", "second", "out"), f"*{NAMES[dtype]}:16"
            ) | {"scale_log2": "fp32"}
            names = forward_kernel.arg_names
            types |= {name: "i64" for name in names if name.endswith(("_stride_b", "_stride_h"))}
            types |= dict.fromkeys((*constants, *(n for n in names if n.endswith("_stride_d"))), "constexpr")
            signature = {name: types.get(name, "i32") for name in names}
            constants |= {name: 1 for name in names if name.endswith("_stride_d")}
            yield f"forward {NAMES[dtype]} d={d} T={n_keys}", forward_kernel, signature, constants, options
