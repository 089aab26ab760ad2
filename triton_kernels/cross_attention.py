"""Cross attention over at most 128 text keys, with head-mean maps of chosen keys: forward and backward.

Shapes: q [B, H, N, d], k and v [Bk, H, T, d] with B = Bk * r, T <= 128, d <= 256, any strides.  Logits are
``scale * q k^T``; ``sink`` further keys have logit 0 and value 0 and are not stored.  The operator's definition and its
checks are in ``difffast/ops/cross_attention.py``; here only what a launch needs is checked.  ``attention_tiles.py``
says how tiles are cut, and what the compilers need.
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

from .attention_tiles import (
    DTYPES,
    LOG2_E,
    NAMES,
    exponentials,
    head_groups,
    near,
    products,
    scale_products,
    store_maps,
    store_weighted,
    stride_unit,
    strides_in,
    summed,
    tile_sizes,
)
from .cross_attention_backward import backward_kv_kernel, backward_kv_launch, backward_q_kernel, backward_q_launch
from .launch import ROUND_PRODUCTS, bits, on_device_of


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
    # Without maps one turn, of which the compiler must not know: see attention_tiles.py.
    for turn in tl.range(0, tl.minimum(heads, H - group * heads), disable_licm=True):
        h = (group * heads + turn).to(tl.int64)
        s0, s1 = products(
            q + (b * q_stride_b + h * q_stride_h + start * q_stride_n) * VECTOR, rows * (q_stride_n * VECTOR), rows_in,
            q_stride_d,
            k + (key_b * k_stride_b + h * k_stride_h) * VECTOR, k_stride_t * VECTOR, k_stride_d, T,
            D, CHUNK, CHUNKS, REST, KEYS, KEYS_REST, BLOCK, False, DOT, ACC,
        )  # fmt: skip
        s0, s1 = scale_products(s0, s1, scale_log2, T, KEYS, KEYS_REST)
        _, p0, p1, total = exponentials(s0, s1, sink, KEYS_REST)
        inverse = 1.0 / total
        store_weighted(
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


def forward_launch(d: int, n_keys: int, dtype: torch.dtype, maps: bool) -> tuple[dict, dict]:
    """(compile-time arguments, compiler options) of :data:`forward_kernel`, all but VECTOR."""
    sizes = tile_sizes(d, n_keys, dtype)
    one_chunk = sizes["CHUNKS"] == 1
    if dtype.itemsize == 4:
        block, options = 16, {"num_warps": 8, "num_stages": 2 if one_chunk else 1}
    elif not maps:
        # Tiles of 128 queries halve what the keys and values cost.  A second stage keeps clear of the assembler's bug
        # (see attention_tiles.py); AMD's lacks it, and the memory for it.
        stages = 2 if torch.version.hip is None else 1
        block, options = 128 if one_chunk else 64, {"num_warps": 8, "num_stages": stages}
    else:
        # Sums of maps take as many registers as the scores: of 128 queries 230 in 8 warps, alone on a multiprocessor.
        # So two or three small programs share one, and their columns come in equal chunks without a rest, which takes
        # registers of its own.  Heads wider than 96 are those of the deepest level, which has few queries: 256 in
        # SD1.5.
        sizes = tile_sizes(d, n_keys, dtype, math.gcd(triton.cdiv(d, 16) * 16, 64 if d <= 64 else 32))
        block = 16 if d > 96 else 64 if sizes["KEYS"] <= 64 else 32
        options = {"num_warps": 4, "num_stages": 1}
    return {**sizes, "MAPS": maps, "BLOCK": block}, options | ROUND_PRODUCTS


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
