"""Kernels of the backward pass of cross attention, and the sizes they are launched with.

The first makes dQ, and a few sums of each query for the second, which makes dK and dV.  ``cross_attention.py`` launches
both; ``attention_tiles.py`` says how tiles are cut.
"""

# Constants and sizes in kernels are upper case, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    chosen_keys,
    exponentials,
    load_columns,
    partition,
    products,
    scale_products,
    store_columns,
    store_weighted,
    tile_sizes,
)
from .launch import ROUND_PRODUCTS, registers


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
    for _ in tl.range(0, 1 if MAPS else tl.minimum(H, 1), disable_licm=True):  # one turn: see attention_tiles.py
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
        peak, p0, p1, total = exponentials(s0, s1, sink, KEYS_REST)
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
            store_weighted(
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


def backward_q_launch(d: int, n_keys: int, dtype: torch.dtype, out: bool, maps: bool) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`backward_q_kernel`, all but VECTOR and DQ."""
    # With maps registers are scarce, and a rest costs more of them than more turns of a loop.
    sizes = tile_sizes(d, n_keys, dtype, 16 if maps and 64 < d <= 80 else 64)
    block = 32 if maps or dtype.itemsize == 4 or n_keys < 64 else 64
    # A second stage keeps clear of the assembler's bug (see attention_tiles.py); AMD's lacks it, and the memory for it.
    pipelined = not maps and dtype.itemsize == 2 and torch.version.hip is None
    options = {"num_warps": 8, "num_stages": 2 if pipelined else 1}
    if pipelined or dtype.itemsize == 4:
        # Left alone, ptxas stops at 128 registers and spills two.
        options |= registers(224 if pipelined and (n_keys > 96 or d > 128) else 168)
    return {**sizes, "OUT": out, "MAPS": maps, "BLOCK": block}, options | ROUND_PRODUCTS


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
    return {**sizes, **widths, "OUT": out, "MAPS": maps, "BLOCK": block}, options | ROUND_PRODUCTS
