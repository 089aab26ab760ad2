"""joint_attention: attend to text and pixels at once, as DeepFloyd IF's UNets do, without joining their keys.

    P = softmax(scale * q [text_k ; k]^T),  out = P [text_v ; v],  maps = mean over heads of P at chosen text keys

Shapes: q [B, H, N, d]; text_k, text_v [Bt, H, T, d], where B = Bt * r and row b of q uses row b // r of them; k, v
[B, H, M, d]; out [B, H, N, d]; maps [B, N, m] float32.  Text and pixels share one softmax, so that the probabilities of
all words of a text add up to less than 1.  Source: GLIDE (arXiv 2112.10741, section 4.1), as Diffusers'
AttnAddedKVProcessor2_0 computes it.

The keys of a text stay the same over the denoising steps; those of the pixels do not.  A kernel that takes the two
separately reads both where they lie.  PyTorch's attention needs them joined.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import _dispatch, _sdpa
from ._attention_checks import check_attention, check_scale, check_tokens, count_repeats, repeat_rows, store_by_row
from ._dispatch import Case, Forced, Operand
from ._installed import SDPA_KERNELS
from ._library import LIBRARY, ignore_autocast
from .cross_attention import cross_attention


@overload
def joint_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    scale: float | None = None,
    map_tokens: None = None,
) -> Tensor: ...


@overload
def joint_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    scale: float | None = None,
    map_tokens: Sequence[int],
) -> tuple[Tensor, Tensor]: ...


@overload
def joint_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    scale: float | None = None,
    map_tokens: Sequence[int] | None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def joint_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    scale: float | None = None,
    map_tokens: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the keys of a text and of pixels in one softmax, and return the maps of chosen tokens on request.

    The result can be differentiated as often as PyTorch can, in all operands and from both outputs.  The backward pass
    of the kernels is the closed form in plain PyTorch, which keeps the probabilities of all heads in memory.

    Args:
        q: the queries [B, H, N, d], in float16, bfloat16, float32 or float64 and with any strides; d <= 256.
        text_k, text_v: the keys and values of the text, [Bt, H, T, d] with 1 <= T <= 128.  Bt divides B, and row b of q
            uses row b // (B / Bt).
        k, v: the keys and values of the pixels, [B, H, M, d] with any M.  If both are None there is only the text, and
            the result is that of :func:`cross_attention`.
        scale: the factor of the logits; None means 1 / sqrt(d).
        map_tokens: the keys of the text whose probabilities are wanted, in the order in which they are wanted; None
            means no maps.

    Returns:
        The output [B, H, N, d], which kernels of ours store as [B, N, H, d], and PyTorch's attention as it likes.
        With ``map_tokens`` also the maps [B, N, m], which are the
        probabilities among all keys, pixels included, averaged over the heads; in float32, or in float64 for operands
        in float64.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    if k is None or v is None:
        if k is not v:
            raise ValueError(
                f"k and v must both be tensors or both be None, got {type(k).__name__}, {type(v).__name__}"
            )
        return cross_attention(q, text_k, text_v, scale=scale, map_tokens=map_tokens)
    scale = None if scale is None else check_scale(scale)
    tokens = [] if map_tokens is None else check_tokens(map_tokens, text_k.shape)
    tensors = (q, text_k, text_v, k, v)
    gradient = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])
    operands = tuple([(x.shape, x.dtype, x.device) for x in tensors])
    strides = None if q.is_cpu else tuple([x.stride() for x in tensors])
    backend, factor = _decide(operands, scale, map_tokens is not None, gradient, strides)
    if backend == "sdpa":
        return _attend(backend, q, text_k, text_v, k, v, factor)
    increasing = sorted(set(tokens))
    try:
        if backend in SDPA_KERNELS:
            return _attend(backend, q, text_k, text_v, k, v, factor)
        run = reference if backend == "reference" else _OPERATORS[backend]
        out, maps = run(q, text_k, text_v, k, v, factor, increasing)
    except Exception as error:
        again = functools.partial(joint_attention, q, text_k, text_v, k, v, scale=scale, map_tokens=map_tokens)
        return _dispatch.answer_otherwise("joint_attention", backend, q.device, error, again)
    if map_tokens is None:
        return out
    return out, maps if tokens == increasing else maps[..., [increasing.index(token) for token in tokens]]


@ignore_autocast
def reference(
    q: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor, scale: float, map_tokens: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch; float16 and bfloat16 are computed in float32.  -> (out, maps)"""
    q_, k_, v_ = _join(q, text_k, text_v, k, v)
    p = (q_ @ k_.transpose(-1, -2) * scale).softmax(-1)
    return store_by_row((p @ v_).to(q.dtype)), p[..., list(map_tokens)].mean(1)


@ignore_autocast
def reference_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    map_tokens: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the closed-form gradients in plain PyTorch.  -> (dq, dtext_k, dtext_v, dk, dv)

    FlashAttention's (arXiv 2205.14135, appendix B), with the maps' gradient added to dP: dP = dO v^T, plus dmaps / H
    at the chosen tokens; dS = P (dP - rowsum(P dP)); dq = scale dS k, dk = scale dS^T q, dv = P^T dO.
    """
    q_, k_, v_ = _join(q, text_k, text_v, k, v)
    p = (q_ @ k_.transpose(-1, -2) * scale).softmax(-1)
    grad = torch.zeros_like(q_) if grad_out is None else grad_out.to(q_.dtype)
    dp = grad @ v_.transpose(-1, -2)
    if grad_maps is not None and len(map_tokens):
        columns = torch.tensor(list(map_tokens), device=q.device)
        share = (grad_maps / q.shape[1]).unsqueeze(1).expand(-1, q.shape[1], -1, -1)
        dp = dp.index_add(-1, columns, share)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    parts = [text_k.shape[2], k.shape[2]]
    of_text, of_pixels = zip(
        *((x.split(parts, 2)) for x in (ds.transpose(-1, -2) @ q_, p.transpose(-1, -2) @ grad)), strict=True
    )
    repeats = count_repeats(q, text_k)
    of_text = (x.unflatten(0, (text_k.shape[0], repeats)).sum(1) for x in of_text)
    dq = store_by_row((ds @ k_).to(q.dtype))
    return dq, *(x.to(q.dtype) for x in (*of_text, *of_pixels))


def _join(q: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, and all keys and values, in the dtype of the computation."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    text_k, text_v = repeat_rows(q, text_k, text_v)
    return tuple(x.to(compute) for x in (q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)))


def _attend(backend: str, q: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    text_k, text_v = repeat_rows(q, text_k, text_v)
    return _sdpa.attend(backend, q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2), scale)


@_dispatch.remember
def _decide(
    forced: Forced,
    operands: tuple[tuple[Any, ...], ...],
    scale: float | None,
    maps: bool,
    gradient: bool,
    strides: tuple[tuple[int, ...], ...] | None,
) -> tuple[str, float]:
    """Check the operands; return the backend, and the factor of the logits.

    Args:
        operands: :class:`Operand` s q, text_k, text_v, k and v, as plain tuples.
        scale: None: the default.
        maps: whether any are wanted.
        gradient: whether the call will be differentiated.
        strides: of the operands; None on a CPU.
    """
    q, text_k, text_v, k, v = (Operand(*each) for each in operands)
    check_attention(q, text_k, text_v, prefix="text_")
    _check_pixels(q, k, v)
    # The closed form in plain PyTorch takes up to 2.5 times as long as the backward pass of PyTorch's attention.
    slow = gradient and not maps
    backend = _dispatch.choose(
        "joint_attention",
        forced,
        q.device,
        q.dtype,
        lambda backend: find_obstacle(backend, q, text_k, text_v, maps),
        lambda backend: backend == "cpp" and slow,
        Case(
            (q.shape, text_k.shape, text_v.shape, k.shape, v.shape),
            strides,
            (("maps", maps), ("gradient", gradient)),
        ),
    )
    return backend, q.shape[3] ** -0.5 if scale is None else scale


def _check_pixels(q: Operand, k: Operand, v: Operand) -> None:
    """Check that the keys and values of the pixels fit the queries, which have been checked."""
    batch, heads, _, dim = q.shape
    if len(k.shape) != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, dim):
        raise ValueError(f"k must be [{batch}, {heads}, pixels, {dim}] like q, got {tuple(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")


def find_obstacle(backend: str, q: Operand, text_k: Operand, text_v: Operand, maps: bool) -> str | None:
    """Say why a backend that exists here cannot serve these operands, or return None."""
    if backend == "cpp" and q.dtype == torch.float16:
        return "it takes float32, float64 and bfloat16, got float16"
    if backend == "triton":
        from difffast.triton_kernels import joint_attention as kernels

        return kernels.obstacle(q, text_k, text_v)
    return _sdpa.find_obstacle(backend, q, maps)


_SCHEMA = (
    "(Tensor q, Tensor text_k, Tensor text_v, Tensor k, Tensor v, float scale, int[] map_tokens) "
    "-> (Tensor out, Tensor maps)"
)
_OPERATORS: dict[str, Any] = {}


def _fake(
    q: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor, scale: float, map_tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, rows, heads, dim).transpose(1, 2), q.new_empty(batch, rows, len(map_tokens), dtype=sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.scale, ctx.map_tokens = inputs
    ctx.save_for_backward(*operands)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_maps is None:
        return (None,) * 7
    gradients = reference_backward(grad_out, grad_maps, *ctx.saved_tensors, ctx.scale, ctx.map_tokens)
    return (*gradients, None, None)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from difffast.triton_kernels import joint_attention as kernels

    return kernels.forward(*arguments)


for _backend in ("triton", "cpp"):
    _name = f"joint_attention.{_backend}"
    LIBRARY.define(f"{_name}{_SCHEMA}")
    torch.library.register_fake(f"difffast::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"difffast::{_name}", _differentiate, setup_context=_save, lib=LIBRARY)
    _OPERATORS[_backend] = getattr(torch.ops.difffast.joint_attention, _backend)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("joint_attention.triton", _triton, _device)
