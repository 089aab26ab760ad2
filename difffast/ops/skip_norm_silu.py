"""skip_norm_silu: apply GroupNorm and SiLU to cat([hidden, skip]), without the cat, where decoder steps share the skip.

    both = silu(group_norm(cat([hidden, skip repeated k times], 1)))
    per_step = both[:, :E],  shared = both[::k, E:]

Shapes: hidden [Bs * k, Ch, H, W], of which row b uses row b // k of skip [Bs, Cs, H, W]; weight, bias [Ch + Cs];
per_step [Bs * k, E, H, W]; shared [Bs, Ch + Cs - E, H, W].  E is Ch rounded up to whole groups of (Ch + Cs) / groups
channels.

Channels from E on are normalised together with channels of the skip only.  They are the same for all k steps, and are
made once.  The E - Ch channels of the skip whose group begins in hidden are made for every step.

The convolution that follows is cut at E as well.  Both parts of its weights are views:
conv(both) = conv(per_step, weight[:, :E]) + conv(shared, weight[:, E:]) repeated k times.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Case, Forced, Operand, answer_otherwise, remember
from ._library import LIBRARY
from ._norm_checks import Layout, check_norm, is_channels_last, memory_format
from ._norm_choice import choose_for
from .group_norm_silu import reference as norm
from .group_norm_silu import reference_backward as norm_backward


def skip_norm_silu(
    hidden: Tensor, skip: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """Apply GroupNorm and SiLU to the channels of hidden and skip side by side.

    The result can be differentiated as often as PyTorch can.

    Args:
        hidden: the channels of every step, [Bs * k, Ch, H, W] or [Bs * k, Ch, N], in float16, bfloat16, float32 or
            float64.  The k steps of a sample are neighbours.  The operand is read where it lies if it is contiguous or
            channels_last; any other layout is copied first.
        skip: the channels that k steps share, [Bs, Cs, H, W], in the dtype of hidden.
        groups: the number of groups, which divides Ch + Cs.
        weight, bias: the parameters of the norm, [Ch + Cs]; those of hidden's channels come first.
        eps: a number that is added to the variance.
        silu: False leaves the SiLU out.

    Returns:
        per_step [Bs * k, E, H, W] are the channels that differ between steps, and shared [Bs, Ch + Cs - E, H, W] those
        that do not; there may be none of these.  E is Ch rounded up to whole groups.  Both have hidden's memory format.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    backend = _decide(
        (hidden.shape, hidden.dtype, hidden.device),
        (hidden.stride(), hidden.is_contiguous()),
        not hidden.is_cpu and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
        (skip.shape, skip.dtype, skip.device),
        groups,
        ((weight.shape, weight.dtype, weight.device), (bias.shape, bias.dtype, bias.device)),
    )
    arguments = (hidden, skip, groups, weight, bias, float(eps), bool(silu))
    if backend == "reference":
        return reference(*arguments)
    try:
        return _OPERATORS[backend](*arguments)
    except Exception as error:
        again = functools.partial(skip_norm_silu, *arguments)
        return answer_otherwise("skip_norm_silu", backend, hidden.device, error, again)


@remember
def _decide(
    forced: Forced,
    hidden: tuple[Any, ...],
    layout: Layout,
    gradient: bool,
    skip: tuple[Any, ...],
    groups: int,
    parameters: tuple[tuple[Any, ...], tuple[Any, ...]],
) -> str:
    """Check the operands and return the backend.

    Args:
        hidden, skip, parameters: :class:`Operand` s as plain tuples; the parameters are weight and bias.
        layout: of hidden.
        gradient: whether the call will be differentiated; not asked on a CPU.
    """
    hidden, skip = Operand(*hidden), Operand(*skip)
    weight, bias = (Operand(*each) for each in parameters)
    if len(skip.shape) != len(hidden.shape) or skip.shape[2:] != hidden.shape[2:] or not skip.shape[1]:
        raise ValueError(
            f"skip must have channels and the pixels of hidden, got {tuple(skip.shape)} and {tuple(hidden.shape)}"
        )
    channels = hidden.shape[1] + skip.shape[1]
    check_norm("hidden", hidden, groups, {"skip": skip, "weight": weight, "bias": bias}, channels)
    if bool(skip.shape[0]) != bool(hidden.shape[0]) or (skip.shape[0] and hidden.shape[0] % skip.shape[0]):
        raise ValueError(f"skip's batch must divide hidden's, got {skip.shape[0]} and {hidden.shape[0]}")
    case = Case((hidden.shape, skip.shape), (layout[0],), (("groups", groups), ("gradient", gradient)))
    return choose_for("skip_norm_silu", forced, hidden, layout, channels // groups, case)


def own_channels(hidden_channels: int, skip_channels: int, groups: int) -> int:
    """Return E, the number of channels that are made for every step: ``hidden_channels`` rounded up to whole groups."""
    size = (hidden_channels + skip_channels) // groups
    return -(-hidden_channels // size) * size


def reference(
    hidden: Tensor, skip: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch, in the dtype of ``hidden``.  -> (per_step, shared)"""
    layout = memory_format(hidden)
    own = own_channels(hidden.shape[1], skip.shape[1], groups)
    kept = own * groups // weight.shape[0]
    mine, rest = _parts(hidden, skip, own)
    per_step = norm(mine, kept, weight[:own], bias[:own], eps, silu=silu)
    if kept < groups:
        rest = norm(rest, groups - kept, weight[own:], bias[own:], eps, silu=silu)
    return per_step.contiguous(memory_format=layout), rest.contiguous(memory_format=layout)


def _parts(hidden: Tensor, skip: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """The channels up to ``own`` for every step, and the skip's other channels."""
    straddling = own - hidden.shape[1]
    if not straddling:
        return hidden, skip
    repeats = hidden.shape[0] // max(1, skip.shape[0])
    return torch.cat([hidden, skip[:, :straddling].repeat_interleave(repeats, 0)], 1), skip[:, straddling:]


_SCHEMA = (
    "(Tensor hidden, Tensor skip, int groups, Tensor weight, Tensor bias, float eps, bool silu) "
    "-> (Tensor per_step, Tensor shared)"
)
_OPERATORS: dict[str, Any] = {}


def _fake(
    hidden: Tensor, skip: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    own, layout = own_channels(hidden.shape[1], skip.shape[1], groups), memory_format(hidden)
    per_step = (hidden.shape[0], own, *hidden.shape[2:])
    shared = (skip.shape[0], weight.shape[0] - own, *skip.shape[2:])
    per_step, shared = (
        torch.empty(shape, dtype=hidden.dtype, device=hidden.device, memory_format=layout)
        for shape in (per_step, shared)
    )
    return per_step, shared


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, skip, ctx.groups, weight, bias, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(hidden, skip, weight, bias)


def _differentiate(ctx: Any, grad_per_step: Tensor, grad_shared: Tensor) -> tuple[Any, ...]:
    hidden, skip, weight, bias = ctx.saved_tensors
    own = own_channels(hidden.shape[1], skip.shape[1], ctx.groups)
    kept = own * ctx.groups // weight.shape[0]
    mine, rest = _parts(hidden, skip, own)

    def part(grad: Tensor, x: Tensor, groups: int, channels: slice) -> tuple[Tensor, ...]:
        gradients = norm_backward(grad, x, groups, weight[channels], bias[channels], ctx.eps, silu=ctx.silu)
        return gradients[:3]

    dmine, dweight, dbias = part(grad_per_step, mine, kept, slice(own))
    dhidden, dstraddling = dmine.split([hidden.shape[1], own - hidden.shape[1]], 1)
    dskip = dstraddling.unflatten(0, (skip.shape[0], hidden.shape[0] // max(1, skip.shape[0]))).sum(1)
    if kept < ctx.groups:
        drest, *of_rest = part(grad_shared, rest, ctx.groups - kept, slice(own, None))
        dskip, dweight, dbias = (
            torch.cat(both, -1 if both[0].ndim == 1 else 1)
            for both in ((dskip, drest), (dweight, of_rest[0]), (dbias, of_rest[1]))
        )
    return dhidden, dskip, None, dweight, dbias, None, None


def _triton(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from difffast.triton_kernels import skip_norm_silu as kernels

    return kernels.forward(hidden, *rest, channels_last=is_channels_last(hidden))


for _name in ("cpp", "cuda", "triton"):
    LIBRARY.define(f"skip_norm_silu.{_name}{_SCHEMA}")
    torch.library.register_fake(f"difffast::skip_norm_silu.{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"difffast::skip_norm_silu.{_name}", _differentiate, setup_context=_save, lib=LIBRARY
    )
    _OPERATORS[_name] = getattr(torch.ops.difffast.skip_norm_silu, _name)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("skip_norm_silu.triton", _triton, _device)
