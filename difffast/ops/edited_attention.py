"""edited_attention: attend with a map that is made of two others, which never exist.

    A' = A_source S + A diag(o),    out = A' v = A_source (S v) + A (diag(o) v)

with A_source = softmax(scale * source_q source_k^T) and A = softmax(scale * q k^T).

Shapes: source_q, q [B, H, N, d]; source_k [Bk, H, Ts, d]; k, v [Bk, H, T, d], where B = Bk * r and row b of the queries
uses row b // r of them; S, called mix, [Ts, T]; o, called keep, [T]; out [B, H, N, d].  Every edit of Prompt-to-Prompt
(arXiv 2208.01626, section 3.2) is of this form.  S v and diag(o) v are small, so that two fused attentions compute it,
and one where o is zero.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _sdpa
from ._attention_checks import check_attention, check_scale, repeat_rows, store_by_row
from ._dispatch import Forced, Operand
from ._library import LIBRARY, ignore_autocast, refuse_second_derivative
from .cross_attention import reference_backward


def edited_attention(
    source_q: Tensor,
    source_k: Tensor,
    v: Tensor,
    mix: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    scale: float | None = None,
    mixed: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Attend with an edited map.

    The result can be differentiated once in all operands; with the reference and sdpa backends, as often as PyTorch
    can.

    Args:
        source_q: the source's queries [B, H, N, d], in float16, bfloat16, float32 or float64; d <= 256.
        source_k: the source's keys [Bk, H, Ts, d], 1 <= Ts <= 128.  Bk divides B.
        v: the values [Bk, H, T, d], 1 <= T <= 128.
        mix: S [Ts, T], what of the source's probability of a key goes to each value.
        q, k: queries and keys of the map's own, like ``source_q`` and ``v``.
        keep: o [T], what of its own probability each key keeps.  None: nothing; then ``q`` and ``k`` are None as well.
        scale: the factor of the logits; None means 1 / sqrt(d).
        mixed: what :func:`mix_values` has made of ``v``, ``mix`` and ``keep``, for calls that have these in common.
            None: it is made anew.

    Returns:
        The output [B, H, N, d], stored as [B, N, H, d].
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    scale = None if scale is None else check_scale(scale)
    named = (source_q, source_k, v, mix, q, k, keep, *(mixed or (None, None)))
    backend, factor = _decide(tuple([None if x is None else (x.shape, x.dtype, x.device) for x in named]), scale)
    if backend == "reference":
        return reference(source_q, source_k, v, mix, q, k, keep, factor)
    first, second = mixed or mix_values(v, mix, keep)
    try:
        if backend == "triton" and second is not None:
            return torch.ops.difffast.edited_attention.triton(source_q, source_k, first, q, k, second, factor)
        out = _attend(backend, source_q, source_k, first, factor)
        if second is None:
            return out
        own = _attend(backend, q, k, second, factor)
        return out + own if out.requires_grad or own.requires_grad else out.add_(own)
    except Exception as error:
        operands = (source_q, source_k, v, mix, q, k, keep)
        again = functools.partial(edited_attention, *operands, scale=scale, mixed=mixed)
        return _dispatch.answer_otherwise("edited_attention", backend, v.device, error, again)


@ignore_autocast
def reference(
    source_q: Tensor,
    source_k: Tensor,
    v: Tensor,
    mix: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    keep: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute the definition in plain PyTorch, with its maps; float16 and bfloat16 are computed in float32."""
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    keys, values = (x.to(compute) for x in repeat_rows(source_q, source_k, v))
    maps = (source_q.to(compute) @ keys.transpose(-1, -2) * scale).softmax(-1) @ mix.to(compute)
    if keep is not None:
        own = repeat_rows(q, k, k)[0].to(compute)
        maps = maps + (q.to(compute) @ own.transpose(-1, -2) * scale).softmax(-1) * keep.to(compute)
    return store_by_row((maps @ values).to(v.dtype))


@ignore_autocast
def mix_values(v: Tensor, mix: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return S v [Bk, H, Ts, d] and diag(o) v, in the dtype of ``v``; None where there is no o."""
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    values = v.transpose(1, 2).to(compute)  # by row, so that one product a batch row has all heads
    first = (mix.to(compute) @ values.flatten(2)).unflatten(2, values.shape[2:])
    second = None if keep is None else (keep.to(compute)[:, None, None] * values).transpose(1, 2).to(v.dtype)
    return first.transpose(1, 2).to(v.dtype), second


def _attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if backend in ("cpp", "triton"):
        return getattr(torch.ops.difffast.cross_attention, backend)(q, k, v, scale, 0, [])[0]
    return store_by_row(_sdpa.attend(backend, q, *repeat_rows(q, k, v), scale))


@_dispatch.remember
def _decide(forced: Forced, operands: tuple[Any, ...], scale: float | None) -> tuple[str, float]:
    """Check the operands; return the backend, and the factor of the logits.

    Args:
        operands: of all operands in their order, then of the mixed values, :class:`Operand` s as plain tuples or None.
        scale: None: the default.
    """
    *named, first, second = (None if each is None else Operand(*each) for each in operands)
    source_q, source_k, v, mix, q, k, keep = named
    check_attention(source_q, source_k, source_k, prefix="source_")
    if (q is None) != (keep is None) or (k is None) != (keep is None):
        raise ValueError("q, k and keep must all be given, or none of them")
    if q is not None and k is not None:
        check_attention(q, k, v)
    elif len(v.shape) != 4:
        raise ValueError(f"v must be [batch, heads, keys, head_dim], got {tuple(v.shape)}")
    keys, own = source_k.shape[2], v.shape[2]
    for name, x, shape in (
        ("v", v, (source_k.shape[0], source_k.shape[1], own, source_k.shape[3])),
        ("mix", mix, (keys, own)),
        ("q", q, tuple(source_q.shape)),
        ("keep", keep, (own,)),
        ("mixed[0]", first, tuple(source_k.shape)),
        ("mixed[1]", second, tuple(v.shape)),
    ):
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        if x is not None and (x.dtype != source_q.dtype or x.device != source_q.device):
            wanted = f"{source_q.dtype} on {source_q.device}"
            raise ValueError(f"{name} must be {wanted} like source_q, got {x.dtype} on {x.device}")
    if first is not None and (second is None) != (keep is None):
        raise ValueError("mixed[1] must be given where keep is, and only there")
    if not 1 <= own <= 128:
        raise ValueError(f"v must have 1 to 128 keys, got {own}")
    backend = _dispatch.choose(
        "edited_attention",
        forced,
        v.device,
        v.dtype,
        lambda backend: find_obstacle(backend, source_q, source_k, v),
    )
    return backend, source_q.shape[3] ** -0.5 if scale is None else scale


def find_obstacle(backend: str, q: Operand, k: Operand, v: Operand) -> str | None:
    """Say why a backend that exists here cannot serve these operands, or return None."""
    if backend == "cpp" and q.dtype == torch.float16:
        return "it takes float32, float64 and bfloat16, got float16"
    if backend == "triton":
        from difffast.triton_kernels import edited_attention as kernels

        return kernels.obstacle(q, k, v)
    return _sdpa.find_obstacle(backend, q)


_SCHEMA = "(Tensor source_q, Tensor source_k, Tensor first, Tensor q, Tensor k, Tensor second, float scale) -> Tensor"
_BACKWARD = (
    "(Tensor grad, Tensor source_q, Tensor source_k, Tensor first, Tensor q, Tensor k, Tensor second, float scale) "
    "-> (Tensor dsource_q, Tensor dsource_k, Tensor dfirst, Tensor dq, Tensor dk, Tensor dsecond)"
)


def _fake(
    source_q: Tensor, source_k: Tensor, first: Tensor, q: Tensor, k: Tensor, second: Tensor, scale: float
) -> Tensor:
    batch, heads, rows, dim = source_q.shape
    return source_q.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands)


def _backward(grad: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Compute the closed-form gradients of both attentions, which do not know of each other."""
    *tensors, scale = operands
    return tuple(
        each.contiguous()
        for attention in (tensors[:3], tensors[3:])
        for each in reference_backward(grad, None, *attention, scale)
    )


def _fake_backward(grad: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in operands[:-1])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = torch.ops.difffast.edited_attention_backward.triton(grad, *ctx.saved_tensors, ctx.scale)
    return (*found, None)


def _triton(*arguments: Any) -> Tensor:
    from difffast.triton_kernels import edited_attention as kernels

    return kernels.forward(*arguments)


LIBRARY.define(f"edited_attention.triton{_SCHEMA}")
LIBRARY.define(f"edited_attention_backward.triton{_BACKWARD}")
torch.library.register_fake("difffast::edited_attention.triton", _fake, lib=LIBRARY)
torch.library.register_fake("difffast::edited_attention_backward.triton", _fake_backward, lib=LIBRARY)
refuse_second_derivative("edited_attention", "edited_attention_backward.triton")
torch.library.register_autograd("difffast::edited_attention.triton", _differentiate, setup_context=_save, lib=LIBRARY)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("edited_attention.triton", _triton, _device)
    LIBRARY.impl("edited_attention_backward.triton", _backward, _device)
