"""cross_attention: attend to at most 128 keys, and return the attention map averaged over heads on request.

    P = softmax(scale * q k^T),  out = P v,  maps = mean over heads of P at chosen keys

Shapes: q [B, H, N, d]; k, v [Bk, H, T, d], where B = Bk * r and row b of q uses row b // r of k and v; out
[B, H, N, d]; maps [B, N, M] float32.

``sink`` more keys with logit 0 and value 0 take part in the softmax without being stored.  They are the rows that
semantic binding has absorbed (ToMe, arXiv 2411.07132, section 4.1, and its released code).  The backward pass starts
from both outputs.  It is FlashAttention's (arXiv 2205.14135, appendix B), with the gradient of the maps added to dP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _sdpa
from ._attention_checks import check_attention, check_scale, check_tokens, count_repeats, repeat_rows, store_by_row
from ._dispatch import Case, Forced, Operand
from ._installed import SDPA_KERNELS
from ._library import LIBRARY, ignore_autocast, refuse_second_derivative

#: Products q k below which the C++ kernel loses to PyTorch's attention.
_SMALL = 1 << 14


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, sink: int = 0, map_tokens: None = None
) -> Tensor: ...


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, sink: int = 0, map_tokens: Sequence[int]
) -> tuple[Tensor, Tensor]: ...


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, sink: int = 0, map_tokens: Sequence[int] | None
) -> Tensor | tuple[Tensor, Tensor]: ...


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    sink: int = 0,
    map_tokens: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the keys of a text, and return the maps of chosen tokens on request.

    The result can be differentiated once in q, k and v, from both outputs.  With the reference and sdpa backends it can
    be differentiated as often as PyTorch can.

    Args:
        q: the queries [B, H, N, d], in float16, bfloat16, float32 or float64 and with any strides; d <= 256.
        k, v: the keys and values [Bk, H, T, d] with 1 <= T <= 128.  Bk divides B, and row b of q uses row
            b // (B / Bk).
        scale: the factor of the logits; None means 1 / sqrt(d).
        sink: the number of keys with logit 0 and value 0 that are not stored.
        map_tokens: the keys whose probabilities are wanted, in the order in which they are wanted; None means no maps.

    Returns:
        The output [B, H, N, d], which kernels of ours store as [B, N, H, d], and PyTorch's attention as it likes.
        With ``map_tokens`` also the maps [B, N, M], which are the
        probabilities averaged over the heads; in float32, or in float64 for operands in float64.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    scale = None if scale is None else check_scale(scale)
    tokens = [] if map_tokens is None else check_tokens(map_tokens, k.shape)
    operands = (q.shape, q.dtype, q.device), (k.shape, k.dtype, k.device), (v.shape, v.dtype, v.device)
    layout, gradient = None, False
    if not q.is_cpu:  # there, kernels differ in whether they like how operands lie in memory, and go backward
        layout = _find_layout(q, k, v)
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    backend, factor = _decide(operands, scale, sink, map_tokens is not None, layout, gradient)
    if backend == "sdpa":
        return _attend(backend, q, k, v, factor, sink)
    increasing = sorted(set(tokens))
    try:
        if backend in SDPA_KERNELS:
            return _attend(backend, q, k, v, factor, sink)
        run = reference if backend == "reference" else _OPERATORS[backend]
        out, maps = run(q, k, v, factor, sink, increasing)
    except Exception as error:
        again = functools.partial(cross_attention, q, k, v, scale=scale, sink=sink, map_tokens=map_tokens)
        return _dispatch.answer_otherwise("cross_attention", backend, q.device, error, again)
    if map_tokens is None:
        return out
    if tokens != increasing:
        maps = maps[..., [increasing.index(token) for token in tokens]]
    return out, maps


@ignore_autocast
def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sink: int = 0, map_tokens: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch; float16 and bfloat16 are computed in float32.  -> (out, maps)"""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_, k_, v_ = (x.to(compute) for x in (q, *repeat_rows(q, k, v)))
    logits = q_ @ k_.transpose(-1, -2) * scale
    if sink:
        # One more column of logit log(sink) is `sink` columns of logit 0.
        logits = F.pad(logits, (0, 1), value=math.log(sink))
    p = logits.softmax(-1)[..., : k.shape[2]]
    return store_by_row((p @ v_).to(q.dtype)), p[..., list(map_tokens)].mean(1)


@ignore_autocast
def reference_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sink: int = 0,
    map_tokens: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the closed-form gradients in plain PyTorch.  -> (dq, dk, dv)

    dP = dO v^T, plus dmaps / H at the chosen tokens; dS = P (dP - rowsum(P dP)); dq = scale dS k, dk = scale dS^T q,
    dv = P^T dO.  The sink takes no part: its dP is 0.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_, k_, v_ = (x.to(compute) for x in (q, *repeat_rows(q, k, v)))
    logits = q_ @ k_.transpose(-1, -2) * scale
    if sink:
        logits = F.pad(logits, (0, 1), value=math.log(sink))
    p = logits.softmax(-1)[..., : k.shape[2]]
    grad = torch.zeros_like(q_) if grad_out is None else grad_out.to(compute)
    dp = grad @ v_.transpose(-1, -2)
    if grad_maps is not None and len(map_tokens):
        dp[..., list(map_tokens)] += grad_maps.unsqueeze(1) / q.shape[1]
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    repeats = count_repeats(q, k)
    dk, dv = (
        x.unflatten(0, (k.shape[0], repeats)).sum(1).to(k.dtype)
        for x in (ds.transpose(-1, -2) @ q_, p.transpose(-1, -2) @ grad)
    )
    return store_by_row((ds @ k_).to(q.dtype)), dk, dv


def _attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, sink: int) -> Tensor:
    k, v = repeat_rows(q, k, v)
    if sink:
        k, v = F.pad(k, (0, 0, 0, sink)), F.pad(v, (0, 0, 0, sink))
    return _sdpa.attend(backend, q, k, v, scale)


#: How an operand lies in memory: its strides, and its storage offset modulo 8.
_Layout = tuple[tuple[int, ...], int]


@_dispatch.remember
def _decide(
    forced: Forced,
    operands: tuple[tuple[Any, ...], ...],
    scale: float | None,
    sink: int,
    maps: bool,
    layout: tuple[_Layout, ...] | None,
    gradient: bool,
) -> tuple[str, float]:
    """Check the operands; return the backend, and the factor of the logits.

    Args:
        operands: :class:`Operand` s q, k and v, as plain tuples.
        scale: None: the default.
        maps: whether any are wanted.
        layout: of q, k and v; None on a CPU.
        gradient: whether the call will be differentiated; not asked on a CPU.
    """
    q, k, v = (Operand(*each) for each in operands)
    check_attention(q, k, v)
    if type(sink) is not int or sink < 0:
        raise ValueError(f"sink must be an int of at least 0, got {sink!r}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    backend = _dispatch.choose(
        "cross_attention",
        forced,
        q.device,
        q.dtype,
        lambda backend: find_obstacle(backend, q, k, v, scale, maps, layout),
        lambda backend: _loses(backend, q, k, maps),
        Case(
            (q.shape, k.shape, v.shape),
            None if layout is None else (layout[0][0], layout[1][0], layout[2][0]),
            (("sink", sink), ("maps", maps), ("gradient", gradient)),
        ),
    )
    return backend, scale


def find_obstacle(
    backend: str, q: Operand, k: Operand, v: Operand, scale: float, maps: bool, layout: tuple[_Layout, ...] | None
) -> str | None:
    """Say why a backend that exists here cannot serve these operands, or return None."""
    if backend == "cpp" and q.dtype == torch.float16:
        return "it takes float32, float64 and bfloat16, got float16"
    if backend == "triton":
        from difffast.triton_kernels import attention_tiles

        return attention_tiles.obstacle(q, k, v, maps)
    if backend == "cuda":
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, got {q.dtype}"
        if scale <= 0:
            return f"scale must be positive, got {scale}"
        if q.shape[3] % 8:
            return f"head_dim must be a multiple of 8, got {q.shape[3]}"
        for name, (strides, offset) in zip("qkv", layout or (), strict=False):
            if strides[3] != 1 or offset or any(stride % 8 for stride in strides[:3]):
                return (
                    f"{name} needs rows of neighbours at multiples of 16 bytes, got strides {strides} "
                    f"and storage offset {offset} modulo 8"
                )
    return _sdpa.find_obstacle(backend, q, maps)


def _find_layout(*operands: Tensor) -> tuple[_Layout, ...]:
    """Return how the operands lie in memory; while a call is traced, what is not known counts as unfit."""
    if torch.compiler.is_compiling():  # no trace knows a storage's offset
        return tuple((x.stride(), 1) for x in operands)
    return tuple((x.stride(), x.storage_offset() % 8) for x in operands)


def _loses(backend: str, q: Operand, k: Operand, maps: bool) -> bool:
    """Whether a backend that could run is slower than the next on this shape (measured, bench/ops)."""
    # Against PyTorch's own attention, one key or a few thousand products do not pay for packing the keys.
    return backend == "cpp" and not maps and (k.shape[2] == 1 or math.prod(q.shape) * k.shape[2] < _SMALL)


_SCHEMA = "(Tensor q, Tensor k, Tensor v, float scale, int sink, int[] map_tokens) -> (Tensor out, Tensor maps)"
_BACKWARD_SCHEMA = (
    "(Tensor? grad_out, Tensor? grad_maps, Tensor q, Tensor k, Tensor v, float scale, int sink, int[] map_tokens, "
    "bool need_q, bool need_kv) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_OPERATORS: dict[str, Any] = {}
_BACKWARD: dict[str, Any] = {}


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: int, map_tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, rows, heads, dim).transpose(1, 2), q.new_empty(batch, rows, len(map_tokens), dtype=sums)


def _fake_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sink: int,
    map_tokens: Sequence[int],
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that are not needed have no elements."""
    batch, heads, rows, dim = q.shape
    keys = k.shape if need_kv else (0,)
    dq = q.new_empty(batch, rows, heads, dim).transpose(1, 2) if need_q else q.new_empty(0)
    return dq, k.new_empty(keys), v.new_empty(keys)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # All keys of a row fit one tile: making the probabilities anew costs less than storing anything about them, and is
    # more exact than a stored log-sum-exp.
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v)
    ctx.set_materialize_grads(False)


def _differentiate(backend: str) -> Any:
    operator = _BACKWARD[backend]

    def backward(ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None) -> tuple[Any, ...]:
        need_q, need_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        if grad_out is None and grad_maps is None:
            return (None,) * 6
        dq, dk, dv = operator(grad_out, grad_maps, *ctx.saved_tensors, *ctx.rest, need_q, need_kv)
        return (dq if need_q else None, *((dk, dv) if need_kv else (None, None)), None, None, None)

    return backward


def _define(backend: str, backward: str) -> None:
    """Schema, fake and autograd of one backend's operator; ``backward`` is the backend that differentiates it."""
    LIBRARY.define(f"cross_attention.{backend}{_SCHEMA}")
    torch.library.register_fake(f"difffast::cross_attention.{backend}", _fake, lib=LIBRARY)
    _OPERATORS[backend] = getattr(torch.ops.difffast.cross_attention, backend)
    if backend == backward:
        LIBRARY.define(f"cross_attention_backward.{backend}{_BACKWARD_SCHEMA}")
        torch.library.register_fake(f"difffast::cross_attention_backward.{backend}", _fake_backward, lib=LIBRARY)
        _BACKWARD[backend] = getattr(torch.ops.difffast.cross_attention_backward, backend)
        refuse_second_derivative("cross_attention", f"cross_attention_backward.{backend}")
    torch.library.register_autograd(
        f"difffast::cross_attention.{backend}", _differentiate(backward), setup_context=_save, lib=LIBRARY
    )


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from difffast.triton_kernels import cross_attention as kernels

    return kernels.forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from difffast.triton_kernels import cross_attention as kernels

    return kernels.backward(*arguments)


_define("cpp", backward="cpp")
_define("triton", backward="triton")
_define("cuda", backward="triton")
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("cross_attention.triton", _triton_forward, _device)
    LIBRARY.impl("cross_attention_backward.triton", _triton_backward, _device)
