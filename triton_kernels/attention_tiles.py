"""Tiles of attention over at most 128 text keys: what the kernels of cross, edited and joint attention share.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """Some columns of :func:`store_weighted`, which has the shapes."""
    t = tl.arange(0, KEYS)
    yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
    acc = tl.dot(w0, yc, input_precision="ieee", out_dtype=ACC)
    if KEYS_REST > 0:
        t = KEYS + tl.arange(0, KEYS_REST)
        yc = load_columns(y, t * y_stride_t, t < T, y_stride_d, cols, D).to(DOT)
        acc = tl.dot(w1, yc, acc, input_precision="ieee", out_dtype=ACC)
    store_columns(acc * factor[:, None], out, out_rows, out_in, cols, D)


@triton.jit
def store_weighted(
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
def exponentials(s0, s1, sink, KEYS_REST: tl.constexpr):
    """Largest logit of each row, 2 ** (logit - largest) for both parts, and their sum with ``sink`` logits of zero."""
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
    return peak, p0, p1, total


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


#: Triton's interpreter replaces every kernel at import when TRITON_INTERPRET is set.
INTERPRETED = not isinstance(products, triton.JITFunction)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def obstacle(q: Tensor, k: Tensor, v: Tensor, maps: bool = True) -> str | None:
    """Why these inputs (q [B, H, N, d], k and v [Bk, H, T, d]) cannot run, with maps or without, or None."""
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
        return f"heads of more than 96 channels, without maps, have failed on Hopper GPUs, got d = {d}"
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


def summed(parts: Tensor) -> Tensor:
    """parts [n, ...] summed over n, without a launch when there is one."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
