"""GroupNorm and SiLU, forward and backward: launches of the kernels in ``norm_kernels.py``.

Shapes: x [B, C, N], by strides: NCHW (pixels are neighbours) or channels_last (channels are).  The operators'
definitions and their checks are in ``difffast/ops/group_norm_silu.py`` and ``skip_norm_silu.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, registers
from .norm_kernels import apply_kernel, coefficients_kernel, gradient_kernel, moments_kernel, sums_kernel

#: Programs of the kernels that reduce over pixels, at least, if there are pixels enough: some on every multiprocessor.
_PROGRAMS = 1024
#: Elements of a tile.
_TILE = 2048
#: Compiler options.  Unasked, ptxas now and then spills two registers to keep to 64.
OPTIONS = {"num_warps": 4, **registers(255)}


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
