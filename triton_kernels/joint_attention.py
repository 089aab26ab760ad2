"""Attention over text keys and pixel keys in one softmax, read from where they are; maps of chosen text keys.

Shapes: q [B, H, N, d], text_k and text_v [Bt, H, T, d] with B = Bt * r, T <= 128, k and v [B, H, M, d], d <= 128, any
strides.  The operator's definition and its checks are in ``difffast/ops/joint_attention.py``; here only what a launch
needs is checked.

One program goes over the tiles of the text, then over those of the pixels, with a running maximum and sum
(FlashAttention, arXiv 2205.14135, algorithm 1).  The maps are a second kernel, which makes the logits of the text keys
anew and divides by the denominators that the first has left: maximum and reciprocal sum apart, which is more exact than
a rounded log-sum-exp.  It sums over the heads in a fixed order without atomics: the same bits in every run.

What a tile is, the strides in units of VECTOR elements, the 32-bit offsets inside a tile and float32 products on the
FMA units are as in ``attention_tiles.py``.
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

from . import attention_tiles
from .attention_tiles import (
    DTYPES,
    LOG2_E,
    NAMES,
    head_groups,
    load_columns,
    near,
    partition,
    products,
    store_columns,
    store_maps,
    stride_unit,
    strides_in,
    summed,
    tile_sizes,
)
from .launch import ROUND_PRODUCTS, bits, on_device_of, registers

MAX_HEAD_DIM = 128


@triton.jit
def _attend(
    peak,  # [BLOCK], largest logit so far, base 2
    total,  # [BLOCK], sum of 2 ** (logit - peak)
    acc,  # [BLOCK, WIDTH], sum of 2 ** (logit - peak) * value
    q,  # [BLOCK, D], any strides: first row of the tile
    q_rows,  # int32 [BLOCK], offsets of the rows in elements
    q_in,  # bool [BLOCK], which rows exist
    q_stride_d,
    k,  # [n_keys, D], any strides: first key of the tile
    k_stride_n,  # in elements
    k_stride_d,
    v,  # [n_keys, D], any strides
    v_stride_n,
    v_stride_d,
    n_keys,  # of the tile's keys that exist, at least one
    scale_log2,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """peak, total and acc with one more tile of KEYS keys."""
    s, _ = products(
        q, q_rows, q_in, q_stride_d, k, k_stride_n, k_stride_d, n_keys,
        D, CHUNK, CHUNKS, REST, KEYS, 0, BLOCK, False, DOT, ACC,
    )  # fmt: skip
    t = tl.arange(0, KEYS)
    t_in = t < n_keys
    s = tl.where(t_in[None, :], s * scale_log2, -float("inf"))
    higher = tl.maximum(peak, tl.max(s, 1))
    # While all logits are minus infinity, subtracting the largest would give NaN for keys that count for nothing.
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    values = load_columns(v, t * v_stride_n, t_in, v_stride_d, tl.arange(0, WIDTH), D).to(DOT)
    # Rounded to the type of the input as a tensor-core operand must be, also where DOT is wider (interpreter).
    weights = p.to(v.dtype.element_ty).to(DOT)
    acc = tl.dot(weights, values, acc * fade[:, None], input_precision="ieee", out_dtype=ACC)
    return higher, total * fade + tl.sum(p, 1), acc


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_n", "tk_stride_b", "tk_stride_h", "tk_stride_n",
        "tv_stride_b", "tv_stride_h", "tv_stride_n", "k_stride_b", "k_stride_h", "k_stride_n",
        "v_stride_b", "v_stride_h", "v_stride_n", "scale_log2", "H", "N", "T", "M", "repeats",
    ]
)  # fmt: skip
def forward_kernel(
    q,  # [B, H, N, D], strides below
    text_k,  # [B / repeats, H, T, D], strides below
    text_v,  # [B / repeats, H, T, D], strides below
    k,  # [B, H, M, D], strides below
    v,  # [B, H, M, D], strides below
    out,  # [B, N, H, D] contiguous
    statistics,  # [2, B, H, N] contiguous, written only with STATISTICS: base-2 peak, 1 / denominator
    q_stride_b: tl.int64,  # all strides but those of D in units of VECTOR elements
    q_stride_h: tl.int64,
    q_stride_n: tl.int32,
    q_stride_d,
    tk_stride_b: tl.int64,
    tk_stride_h: tl.int64,
    tk_stride_n: tl.int32,
    tk_stride_d,
    tv_stride_b: tl.int64,
    tv_stride_h: tl.int64,
    tv_stride_n: tl.int32,
    tv_stride_d,
    k_stride_b: tl.int64,
    k_stride_h: tl.int64,
    k_stride_n: tl.int32,
    k_stride_d,
    v_stride_b: tl.int64,
    v_stride_h: tl.int64,
    v_stride_n: tl.int32,
    v_stride_d,
    scale_log2,  # scale * log2(e): the exponentials are of base two
    H,
    N,
    T,
    M,
    repeats,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    TEXT: tl.constexpr,  # keys of a text tile
    TEXTS: tl.constexpr,  # how many of them
    TEXT_REST: tl.constexpr,  # keys of one more, narrower text tile, or 0
    KEYS: tl.constexpr,  # keys of a pixel tile
    VECTOR: tl.constexpr,
    STATISTICS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (query tile, head, batch row): neighbours read the same keys and values, which stay in the L2 cache."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    text_b = b // repeats
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    rows_in = rows < N - start
    q_tile = q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR
    q_rows = rows * (q_stride_n * VECTOR)
    peak = tl.full([BLOCK], -float("inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    acc = tl.zeros([BLOCK, WIDTH], ACC)

    k_tile = text_k + (text_b * tk_stride_b + h * tk_stride_h) * VECTOR
    v_tile = text_v + (text_b * tv_stride_b + h * tv_stride_h) * VECTOR
    for first in range(0, TEXTS * TEXT, TEXT):
        peak, total, acc = _attend(
            peak, total, acc, q_tile, q_rows, rows_in, q_stride_d,
            k_tile, tk_stride_n * VECTOR, tk_stride_d, v_tile, tv_stride_n * VECTOR, tv_stride_d, T - first, scale_log2,
            D, WIDTH, CHUNK, CHUNKS, REST, TEXT, BLOCK, DOT, ACC,
        )  # fmt: skip
        k_tile += TEXT * tk_stride_n * VECTOR
        v_tile += TEXT * tv_stride_n * VECTOR
    if TEXT_REST > 0:
        peak, total, acc = _attend(
            peak, total, acc, q_tile, q_rows, rows_in, q_stride_d,
            k_tile, tk_stride_n * VECTOR, tk_stride_d, v_tile, tv_stride_n * VECTOR, tv_stride_d, T - TEXTS * TEXT,
            scale_log2, D, WIDTH, CHUNK, CHUNKS, REST, TEXT_REST, BLOCK, DOT, ACC,
        )  # fmt: skip

    k_tile = k + (b * k_stride_b + h * k_stride_h) * VECTOR
    v_tile = v + (b * v_stride_b + h * v_stride_h) * VECTOR
    for first in range(0, M, KEYS):
        peak, total, acc = _attend(
            peak, total, acc, q_tile, q_rows, rows_in, q_stride_d,
            k_tile, k_stride_n * VECTOR, k_stride_d, v_tile, v_stride_n * VECTOR, v_stride_d, M - first, scale_log2,
            D, WIDTH, CHUNK, CHUNKS, REST, KEYS, BLOCK, DOT, ACC,
        )  # fmt: skip
        k_tile += KEYS * k_stride_n * VECTOR
        v_tile += KEYS * v_stride_n * VECTOR

    inverse = 1.0 / total
    store_columns(
        acc * inverse[:, None], out + (b * N + start) * (H * D) + h * D, rows * (H * D), rows_in,
        tl.arange(0, WIDTH), D,
    )  # fmt: skip
    if STATISTICS:
        target = statistics + ((b * H + h) * N + start) + rows
        tl.store(target, peak, mask=rows_in)
        tl.store(target + tl.num_programs(2).to(tl.int64) * H * N, inverse, mask=rows_in)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_n", "tk_stride_b", "tk_stride_h", "tk_stride_n", "scale_log2",
        "low", "high", "chosen", "H", "N", "T", "repeats", "heads",
    ]
)  # fmt: skip
def maps_kernel(
    q,  # [B, H, N, D], strides below
    text_k,  # [B / repeats, H, T, D], strides below
    statistics,  # [2, B, H, N] contiguous, of the kernel above
    maps,  # [head groups, B, N, chosen] contiguous
    q_stride_b: tl.int64,  # all strides but those of D in units of VECTOR elements
    q_stride_h: tl.int64,
    q_stride_n: tl.int32,
    q_stride_d,
    tk_stride_b: tl.int64,
    tk_stride_h: tl.int64,
    tk_stride_n: tl.int32,
    tk_stride_d,
    scale_log2,
    low: tl.int64,  # chosen keys 0 .. 63, one bit each
    high: tl.int64,  # chosen keys 64 .. 127
    chosen,  # how many
    H,
    N,
    T,
    repeats,
    heads,  # of one program
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_REST: tl.constexpr,
    VECTOR: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (head group + groups * query tile, batch row)."""
    groups = tl.cdiv(H, heads)
    group = tl.program_id(0) % groups
    b = tl.program_id(1).to(tl.int64)
    text_b = b // repeats
    start = (tl.program_id(0) // groups).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    rows_in = rows < N - start
    plane = tl.num_programs(1).to(tl.int64) * H * N
    map0 = tl.zeros([BLOCK, KEYS], ACC)
    if KEYS_REST > 0:
        map1 = tl.zeros([BLOCK, KEYS_REST], ACC)
    for turn in tl.range(0, tl.minimum(heads, H - group * heads), disable_licm=True):
        h = (group * heads + turn).to(tl.int64)
        s0, s1 = products(
            q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR, rows * (q_stride_n * VECTOR), rows_in,
            q_stride_d,
            text_k + (text_b * tk_stride_b + h * tk_stride_h) * VECTOR, tk_stride_n * VECTOR, tk_stride_d, T,
            D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, False, DOT, ACC,
        )  # fmt: skip
        source = statistics + ((b * H + h) * N + start) + rows
        peak = tl.load(source, mask=rows_in, other=0.0)
        inverse = tl.load(source + plane, mask=rows_in, other=0.0)
        map0 += tl.exp2(s0 * scale_log2 - peak[:, None]) * inverse[:, None]
        if KEYS_REST > 0:
            map1 += tl.exp2(s1 * scale_log2 - peak[:, None]) * inverse[:, None]
    if KEYS_REST == 0:
        map1 = map0
    target = maps + ((group * tl.num_programs(1) + b) * N + start) * chosen
    store_maps(map0, map1, 1.0 / H.to(ACC), target, rows, rows_in, low, high, chosen, KEYS, KEYS_REST)


def obstacle(q: Tensor, text_k: Tensor, text_v: Tensor) -> str | None:
    """Why these inputs (shapes and dtypes as in :func:`forward`) cannot run, or None."""
    if q.shape[3] > MAX_HEAD_DIM:
        return f"heads of at most {MAX_HEAD_DIM} are supported, got d = {q.shape[3]}"
    return attention_tiles.obstacle(q, text_k, text_v)


def forward_launch(d: int, n_text: int, queries: int, dtype: torch.dtype, statistics: bool) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`forward_kernel`, all but VECTOR."""
    exact = dtype.itemsize == 4
    sizes = {name: size for name, size in tile_sizes(d, n_text, dtype).items() if not name.startswith("KEYS")}
    text, texts, rest = partition(n_text, 16 if exact else 64)
    width = triton.next_power_of_2(max(16, d))
    tiles = {"WIDTH": width, "TEXT": text, "TEXTS": texts, "TEXT_REST": rest, "KEYS": 16 if exact else 64}
    if exact:
        # Left alone, ptxas stops at 64 or 128 registers and spills two.
        options = {"num_warps": 8, **registers(168)} if width > 64 else {"num_warps": 4}
        return {**sizes, **tiles, "STATISTICS": statistics, "BLOCK": 16}, {**options, "num_stages": 1, **ROUND_PRODUCTS}
    # The deepest level of a UNet has 64 pixels.
    block = 64 if queries <= 64 else 128
    options = {"num_warps": block // 16, "num_stages": 2, **ROUND_PRODUCTS}
    return {**sizes, **tiles, "STATISTICS": statistics, "BLOCK": block}, options


def maps_launch(d: int, n_text: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`maps_kernel`, all but VECTOR."""
    exact = dtype.itemsize == 4
    options = {"num_warps": 8 if exact else 4, "num_stages": 1, **ROUND_PRODUCTS}
    return {**tile_sizes(d, n_text, dtype), "BLOCK": 16 if exact else 64}, options


def forward(
    q: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor, scale: float, map_tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, N, d] over text_k, text_v [B / r, H, T, d] and k, v [B, H, M, d].

    Args:
        scale: factor of the logits.
        map_tokens: strictly increasing positions of the text keys whose probabilities are wanted.

    Returns:
        out [B, H, N, d] stored as a contiguous [B, N, H, d]; maps [B, N, len(map_tokens)], the mean of the
        probabilities over the heads, in float32, or float64 for float64 inputs.
    """
    (batch, heads, queries, d), n_text, n_maps = q.shape, text_k.shape[2], len(map_tokens)
    q, text_k, text_v, k, v = (near(x) for x in (q, text_k, text_v, k, v))
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty([batch, queries, heads, d])
    group = head_groups(batch, heads, queries) if n_maps and queries else 1
    groups = triton.cdiv(heads, group)
    maps = q.new_empty([groups if n_maps else 1, batch, queries, n_maps], dtype=precise)
    if out.numel():
        statistics = q.new_empty([2, batch, heads, queries] if n_maps else [1], dtype=precise)
        scale_log2, repeats = scale * LOG2_E.value, batch // text_k.shape[0]
        vector = stride_unit(q, text_k, text_v, k, v)
        q_strides, text_strides = strides_in(q, vector), strides_in(text_k, vector)
        with on_device_of(q):
            constants, options = forward_launch(d, n_text, queries, q.dtype, n_maps > 0)
            forward_kernel[(triton.cdiv(queries, constants["BLOCK"]), heads, batch)](
                q, text_k, text_v, k, v, out, statistics,
                *q_strides, *text_strides, *(stride for x in (text_v, k, v) for stride in strides_in(x, vector)),
                scale_log2, heads, queries, n_text, k.shape[2], repeats, VECTOR=vector, **constants, **options,
            )  # fmt: skip
            if n_maps:
                constants, options = maps_launch(d, n_text, q.dtype)
                maps_kernel[(triton.cdiv(queries, constants["BLOCK"]) * groups, batch)](
                    q, text_k, statistics, maps, *q_strides, *text_strides, scale_log2, *bits(map_tokens), n_maps,
                    heads, queries, n_text, repeats, group, VECTOR=vector, **constants, **options,
                )  # fmt: skip
    return out.transpose(1, 2), summed(maps)


def aot_cases(capability: int, quick: bool = False) -> Iterator[tuple]:
    """Every launch, as the functions above make it, for an ahead-of-time compiler.

    Yields:
        (name, kernel, signature, compile-time arguments, compiler options); a ``:16`` after a type means a multiple of
        16, as in Triton's own tools.
    """
    for dtype in DTYPES[:1] if quick else DTYPES:
        for d, n_text in [(64, 77)] if quick else [(8, 1), (40, 77), (64, 77), (80, 100), (128, 128)]:
            launches = [
                ("forward plain", forward_kernel, *forward_launch(d, n_text, 1024, dtype, False)),
                ("forward maps", forward_kernel, *forward_launch(d, n_text, 1024, dtype, True)),
                ("forward few", forward_kernel, *forward_launch(d, n_text, 64, dtype, True)),
                ("maps", maps_kernel, *maps_launch(d, n_text, dtype)),
            ]
            for name, kernel, constants, options in launches:
                constants = {**constants, "VECTOR": math.gcd(d, 16 // dtype.itemsize)}
                signature = _signature(kernel, constants, dtype)
                constants |= {name: 1 for name in kernel.arg_names if name.endswith("_stride_d")}
                yield f"{name} {NAMES[dtype]} d={d} T={n_text}", kernel, signature, constants, options


def _signature(kernel: triton.JITFunction, constants: dict, dtype: torch.dtype) -> dict[str, str]:
    """Types of a kernel's arguments for contiguous inputs."""
    types = dict.fromkeys(("q", "text_k", "text_v", "k", "v", "out"), f"*{NAMES[dtype]}:16")
    types |= dict.fromkeys(("statistics", "maps"), "*fp32:16") | {"scale_log2": "fp32", "low": "i64", "high": "i64"}
    types |= {name: "i64" for name in kernel.arg_names if name.endswith(("_stride_b", "_stride_h"))}
    types |= dict.fromkeys((*constants, *(n for n in kernel.arg_names if n.endswith("_stride_d"))), "constexpr")
    return {name: types.get(name, "i32") for name in kernel.arg_names}
