"""group_norm_silu: apply GroupNorm and SiLU in one pass, with the time embedding before or after the norm.

    z = x + addend,  n = (z - mean) / sqrt(var + eps) over each group,
    u = (n * weight + bias) * (1 + scale) + shift,  out = u * sigmoid(u)

Shapes: x, out [B, C, H, W] or [B, C, N]; weight, bias [C]; addend [Ba, C] or [Ba, C, H, W], where B = Ba * r and row b
of x uses row b // r; scale, shift [B, C].

These are the norms of Diffusers' ResnetBlock2D.  ``addend`` is its time embedding for time_embedding_norm="default", or
anything that all time steps of a parallel decoder share.  ``scale`` and ``shift`` are its time embedding for
"scale_shift".  The variance is the mean of squared differences from the mean (Wu and He, arXiv 1803.08494), never
E[z^2] - mean^2.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._dispatch import Forced, Operand
from ._library import LIBRARY, ignore_autocast, refuse_second_derivative
from ._norm_checks import (
    Layout,
    check_addend,
    check_norm,
    check_rows,
    is_channels_last,
    make_case,
    memory_format,
)
from ._norm_choice import choose_for


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    overwrite: bool = False,
) -> Tensor:
    """Apply GroupNorm and SiLU to ``x``.

    The result can be differentiated in every tensor: once with the Triton kernels, otherwise as often as PyTorch can.

    Args:
        x: the operand [B, C, H, W] or [B, C, N], in float16, bfloat16, float32 or float64.  All other tensors have its
            dtype.  It is read where it lies if it is contiguous or channels_last; any other layout is copied first.
        groups: the number of groups, which divides C.
        weight, bias: the parameters of the norm, [C].
        eps: a number that is added to the variance.
        addend: a tensor that is added to x before the norm, [Ba, C] or [Ba, C, H, W].  Ba divides B, and row b of x
            uses row b // (B / Ba).  So with Ba = B each row has its own, and with Ba = B / k one row serves k
            neighbours, as in the batch-major layout of parallel decoding.  After [Ba, C] dimensions of size 1 may
            follow.
        scale, shift: the modulation [B, C] that is applied after the norm; both are given, or none is.  Dimensions of
            size 1 may follow.
        silu: False leaves the SiLU out.
        overwrite: the caller has no more use for x: where that is faster, the result is put in its place.

    Returns:
        The result in the shape, dtype and memory format of x.  channels_last stays, unlike in ``F.group_norm`` on GPUs.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    # A comparison, which NaN fails too: torch.compile traces it for symbolic numbers, unlike math.isfinite.
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    backend, addend_shape = _decide(
        (x.shape, x.dtype, x.device),
        (x.stride(), x.is_contiguous()),
        not x.is_cpu and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad),
        groups,
        ((weight.shape, weight.dtype, weight.device), (bias.shape, bias.dtype, bias.device)),
        None if addend is None else (addend.shape, addend.dtype, addend.device),
        None if scale is None else (scale.shape, scale.dtype, scale.device),
        None if shift is None else (shift.shape, shift.dtype, shift.device),
    )
    rows = addend if addend_shape is None else addend.reshape(addend_shape)
    if scale is not None:
        scale, shift = scale.reshape(x.shape[:2]), shift.reshape(x.shape[:2])
    arguments = (x, groups, weight, bias, float(eps), rows, scale, shift, bool(silu))
    if backend == "reference":
        return reference(*arguments)
    if overwrite and backend == "cpp" and _may_overwrite(x):
        torch.ops.difffast.group_norm_silu_.cpp(*arguments)
        return x
    try:
        return _OPERATORS[backend](*arguments)[0] if backend == "triton" else _OPERATORS[backend](*arguments)
    except Exception as error:
        modulated = {"addend": rows, "scale": scale, "shift": shift}
        again = functools.partial(group_norm_silu, x, groups, weight, bias, eps, silu=silu, **modulated)
        return _dispatch.answer_otherwise("group_norm_silu", backend, x.device, error, again)


@ignore_autocast
def reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Compute the definition in plain PyTorch, in the dtype of ``x``, for half with statistics in float32."""
    layout = memory_format(x)
    if addend is not None:
        x = _add(x, addend)
    # Not in channels_last: PyTorch's kernel for it on CPUs takes E[z^2] - mean^2, and GPUs have none.  One pixel may
    # lie in either format, so that PyTorch is not shown an image.
    out = torch.group_norm(x.contiguous().flatten(2), groups, weight, bias, eps).reshape(x.shape)
    if scale is not None:
        out = out * (1 + _broadcast(scale, x)) + _broadcast(shift, x)
    if silu:
        out = F.silu(out)
    return out.contiguous(memory_format=layout)


@ignore_autocast
def reference_backward(
    grad_out: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the closed-form gradients in plain PyTorch, in float32 or float64; they can be differentiated themselves.

    With du = dout * s (1 + u (1 - s)), s = sigmoid(u), and dn = du * weight * (1 + scale):
    dz = (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps), means over each group; the others are sums of du and du n.

    Returns:
        dx, dweight, dbias, daddend, dscale, dshift; None for what was not given.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(compute) if addend is None else _add(x.to(compute), addend.to(compute))
    # In NCHW, where PyTorch's sums round less; and centered twice, for what the first mean rounds away.
    grouped = z.contiguous().flatten(2).unflatten(1, (groups, z.shape[1] // groups))
    centered = grouped - grouped.mean((2, 3), keepdim=True)
    centered = centered - centered.mean((2, 3), keepdim=True)
    rstd = (centered.square().mean((2, 3), keepdim=True) + eps).rsqrt()
    n = (centered * rstd).flatten(1, 2)
    y = n * weight.to(compute)[:, None] + bias.to(compute)[:, None]
    factor = 1 if scale is None else 1 + scale.to(compute)[..., None]
    du = grad_out.to(compute).contiguous().flatten(2)
    if silu:
        u = y if scale is None else y * factor + shift.to(compute)[..., None]
        s = u.sigmoid()
        du = du * s * (1 + u * (1 - s))
    dy = du * factor
    dn = (dy * weight.to(compute)[:, None]).view_as(grouped)
    n_ = n.view_as(grouped)
    dz = rstd * (dn - dn.mean((2, 3), keepdim=True) - n_ * (dn * n_).mean((2, 3), keepdim=True))
    dx = dz.reshape(x.shape)
    return (
        dx.to(x.dtype).contiguous(memory_format=memory_format(x)),
        (dy * n).sum(2).sum(0).to(weight.dtype),
        dy.sum(2).sum(0).to(bias.dtype),
        None if addend is None else _sum_for(dx, addend),
        None if scale is None else (du * y).sum(2).to(scale.dtype),
        None if shift is None else du.sum(2).to(shift.dtype),
    )


def _may_overwrite(x: Tensor) -> bool:
    """Return whether x has memory to itself, and no gradient or program will want what was in it."""
    dense = x.is_contiguous() or is_channels_last(x)
    return dense and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@_dispatch.remember
def _decide(
    forced: Forced,
    x: tuple[Any, ...],
    layout: Layout,
    gradient: bool,
    groups: int,
    parameters: tuple[tuple[Any, ...], tuple[Any, ...]],
    addend: tuple[Any, ...] | None,
    scale: tuple[Any, ...] | None,
    shift: tuple[Any, ...] | None,
) -> tuple[str, tuple[int, int] | None]:
    """Check the operands; return the backend, and the shape that the addend shall be given, None: the one it has.

    Args:
        x, parameters, addend, scale, shift: :class:`Operand` s as plain tuples; the parameters are weight and bias.
        layout: of x.
        gradient: whether the call will be differentiated; not asked on a CPU.
    """
    x = Operand(*x)
    weight, bias = (Operand(*each) for each in parameters)
    check_norm("x", x, groups, {"weight": weight, "bias": bias})
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got only " + ("scale" if shift is None else "shift"))
    shape = None if addend is None else check_addend(x, Operand(*addend))
    for name, rows in (("scale", scale), ("shift", shift)):
        if rows is not None:
            check_rows(name, x, Operand(*rows))
    addends = 0 if addend is None else addend[0][0]
    case = make_case(x, layout, groups, addends, addend is not None and shape is None, scale is not None, gradient)
    return choose_for("group_norm_silu", forced, x, layout, x.shape[1] // groups, case), shape


def _broadcast(rows: Tensor, x: Tensor) -> Tensor:
    """Give [B, C] the rank of x."""
    return rows.reshape(*rows.shape, *(1 for _ in x.shape[2:]))


def _add(x: Tensor, addend: Tensor) -> Tensor:
    """Return x + addend, each row of which serves neighbours in x."""
    if addend.ndim == 2:
        addend = _broadcast(addend, x)
    if addend.shape[0] == x.shape[0]:
        return x + addend
    by_row = x.unflatten(0, (addend.shape[0], x.shape[0] // addend.shape[0]))
    return (by_row + addend.unsqueeze(1)).flatten(0, 1)


def _sum_for(dz: Tensor, addend: Tensor) -> Tensor:
    """Return the gradient of an addend, from that of the sum."""
    if addend.ndim == 2:
        dz = dz.flatten(2).sum(2)
    if addend.shape[0] != dz.shape[0]:
        dz = dz.unflatten(0, (addend.shape[0], dz.shape[0] // addend.shape[0])).sum(1)
    return dz.to(addend.dtype)


_ARGUMENTS = (
    "(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? addend, Tensor? scale, Tensor? shift, "
    "bool silu)"
)
# coefficients [4, B, C]: center, gain, offset, with which u = (x + addend - center) * gain + offset (center contains an
# addend of one number per channel), and 1 / sqrt(var + eps).  sums [2, B, C]: of du and of du * (x + addend - center).
_RETURNS = {"cpp": "Tensor", "cuda": "Tensor", "triton": "(Tensor out, Tensor coefficients)"}
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor x, Tensor coefficients, int groups, Tensor? addend, bool silu) "
    "-> (Tensor dx, Tensor sums)"
)
_OPERATORS: dict[str, Any] = {}


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _fake_triton(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _fake(x), x.new_empty(4, *x.shape[:2], dtype=compute)


def _fake_triton_backward(
    grad_out: Tensor, x: Tensor, coefficients: Tensor, groups: int, addend: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return _fake(x), coefficients.new_empty(2, *x.shape[:2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.groups, weight, bias, ctx.eps, addend, scale, shift, ctx.silu = inputs
    coefficients = None
    if isinstance(output, tuple):
        coefficients = output[1]
        ctx.mark_non_differentiable(coefficients)
    ctx.save_for_backward(x, weight, bias, addend, scale, shift, coefficients)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 9
    x, weight, bias, *modulation, _ = ctx.saved_tensors
    dx, dweight, dbias, *rest = reference_backward(
        grad_out, x, ctx.groups, weight, bias, ctx.eps, *modulation, ctx.silu
    )
    return dx, None, dweight, dbias, None, *rest, None


def _differentiate_triton(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 9
    x, weight, bias, addend, scale, _shift, coefficients = ctx.saved_tensors
    full = addend if addend is not None and addend.ndim > 2 else None
    dx, (du, du_z) = torch.ops.difffast.group_norm_silu_backward.triton(
        grad_out, x, coefficients, ctx.groups, full, ctx.silu
    )
    du_n = du_z * coefficients[3]
    daddend = None if addend is None else _sum_for(dx.to(du.dtype), addend)
    dscale = dshift = None
    dy, dy_n = du, du_n
    if scale is not None:
        dscale, dshift = (du_n * weight + du * bias).to(x.dtype), du.to(x.dtype)
        dy, dy_n = du * (1 + scale), du_n * (1 + scale)
    dweight, dbias = dy_n.sum(0).to(x.dtype), dy.sum(0).to(x.dtype)
    return dx, None, dweight, dbias, None, daddend, dscale, dshift, None


def _triton_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from difffast.triton_kernels import group_norm_silu as kernels

    return kernels.forward(x, *rest, channels_last=is_channels_last(x))


def _triton_backward(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from difffast.triton_kernels import group_norm_silu as kernels

    return kernels.backward(grad_out, x, *rest, channels_last=is_channels_last(x))


def _define(backend: str, fake: Any, differentiate: Any) -> None:
    """Schema, fake and autograd of one backend's operator."""
    name = f"group_norm_silu.{backend}"
    LIBRARY.define(f"{name}{_ARGUMENTS} -> {_RETURNS[backend]}")
    torch.library.register_fake(f"difffast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"difffast::{name}", differentiate, setup_context=_save, lib=LIBRARY)
    _OPERATORS[backend] = getattr(torch.ops.difffast.group_norm_silu, backend)


# "cuda", of the signature of "cpp", comes last: at exit PyTorch takes operators out of its table in this order, does
# not find the second one of a signature any more, and aborts when another one follows.
_define("cpp", _fake, _differentiate)
LIBRARY.define(f"group_norm_silu_.cpp{_ARGUMENTS.replace('Tensor x', 'Tensor(a!) x')} -> ()")
torch.library.register_fake("difffast::group_norm_silu_.cpp", lambda *_: None, lib=LIBRARY)
_define("triton", _fake_triton, _differentiate_triton)
_define("cuda", _fake, _differentiate)
LIBRARY.define(f"group_norm_silu_backward.triton{_BACKWARD_SCHEMA}")
torch.library.register_fake("difffast::group_norm_silu_backward.triton", _fake_triton_backward, lib=LIBRARY)
refuse_second_derivative("group_norm_silu", "group_norm_silu_backward.triton")
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("group_norm_silu.triton", _triton_forward, _device)
    LIBRARY.impl("group_norm_silu_backward.triton", _triton_backward, _device)
