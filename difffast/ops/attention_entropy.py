"""attention_entropy: measure how spread out the attention maps of chosen prompt tokens are, as a loss to minimise.

    B = softmax(maps[:, :, 1 : n + 1] / tau) over the words,  b = a subject's column of B,
    p = (b - min b) / S with S = sum(b - min b) over the pixels,  loss = -weight * sum over subjects and pixels of
    p ln(p + eps)

Shapes: maps [B, N, T] are probabilities averaged over heads and layers, with the start token in column 0 and the words
in columns 1 .. n; loss [B] is in nats times ``weight``.  This is the entropy loss of ToMe (arXiv 2411.07132, section
4.2), which asks for one focused map for every subject.

S is computed as a sum of differences, not as sum(b) - N min b.  So it is exactly zero for a uniform column, and float32
keeps its digits for a nearly uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _installed
from ._dispatch import Forced
from ._library import LIBRARY, refuse_second_derivative

MAX_TOKENS = 127
DTYPES = (torch.float32, torch.float64)
#: Of tau: kernels multiply by log2(e) / tau, in float32.
_SMALLEST = torch.finfo(torch.float32).tiny


def attention_entropy(
    maps: Tensor,
    anchors: Sequence[int],
    n_tokens: int,
    tau: float = 0.5,
    eps: float = 1e-5,
    weight: float = 2.0,
    detach_min: bool = False,
) -> Tensor:
    """Compute the entropy of the subjects' attention maps.  It is a loss: the lower it is, the more focused they are.

    The loss can be differentiated once in ``maps``, and with the reference backend any number of times.  A column with
    the same value in every pixel (S = 0, which is always so for N = 1) has no shape to focus.  Its p, its loss and its
    gradient are defined as 0.  A NaN in the columns of the words makes the loss of its batch entry NaN, and no other.

    Args:
        maps: attention probabilities of N pixels for T tokens, [B, N, T] with N >= 1, in float32 or float64 and with
            any strides.
        anchors: the column of each subject.  There is at least one, they are distinct, and all lie in 1 .. n_tokens;
            their order does not matter.
        n_tokens: the number of words, without start, end and padding tokens; 1 .. 127, and less than T.
        tau: the temperature of the softmax over the words.
        eps: a number that is added under the logarithm.
        weight: the factor of the loss.
        detach_min: treat min b as a constant in the gradient; the loss stays the same.  Otherwise about 99% of the
            gradient's square lies on the one pixel where b is lowest, which is an artefact of the subtraction.  Of
            several lowest pixels the first one gets that gradient, as in ``torch.min(dim)``.

    Returns:
        The loss [B], in the dtype of ``maps``.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    columns = _check(maps, anchors, n_tokens, tau, eps, weight)
    arguments = (maps, columns, n_tokens, float(tau), float(eps), float(weight), bool(detach_min))
    backend = choose(maps.dtype, maps.device)
    return reference(*arguments) if backend == "reference" else _OPERATORS[backend](*arguments)[0]


def reference(
    maps: Tensor,
    anchors: Sequence[int],
    n_tokens: int,
    tau: float = 0.5,
    eps: float = 1e-5,
    weight: float = 2.0,
    detach_min: bool = False,
) -> Tensor:
    """Compute the definition in plain PyTorch, in the dtype of ``maps`` [B, N, T].  -> loss [B]"""
    b = (maps[..., 1 : n_tokens + 1] / tau).softmax(-1)[..., [anchor - 1 for anchor in anchors]]
    least = b.min(1, keepdim=True).values
    rise = b - (least.detach() if detach_min else least)
    total = rise.sum(1, keepdim=True)
    # Not a torch.where of the quotient alone: its gradient would be 0 * (0 / 0) for a uniform column.
    p = rise / torch.where(total == 0, 1.0, total) * (total != 0)
    return -weight * (p * (p + eps).log()).sum((1, 2))


def reference_backward(
    grad_loss: Tensor,
    maps: Tensor,
    anchors: Sequence[int],
    n_tokens: int,
    tau: float = 0.5,
    eps: float = 1e-5,
    weight: float = 2.0,
    detach_min: bool = False,
) -> Tensor:
    """Compute the closed-form gradient in plain PyTorch, from ``grad_loss`` [B].  -> d loss / d maps [B, N, T]

    With g = -weight (ln(p + eps) + p / (p + eps)) and gbar = sum(g p), of one subject:
    dL/db = (g - gbar) / S, minus (sum(g) - N gbar) / S at the first pixel where b is lowest; and with E = dL/db in the
    subjects' columns and 0 elsewhere, dL/dmaps = B (E - sum(B E) over the words) / tau.
    """
    words = (maps[..., 1 : n_tokens + 1] / tau).softmax(-1)
    chosen = [anchor - 1 for anchor in anchors]
    b = words[..., chosen]
    least, argmin = b.min(1, keepdim=True)
    rise = b - least
    total = rise.sum(1, keepdim=True)
    uniform, divisor = total == 0, torch.where(total == 0, 1.0, total)
    p = rise / divisor
    g = -weight * ((p + eps).log() + p / (p + eps))
    gbar = (g * p).sum(1, keepdim=True)
    slope = (g - gbar) / divisor
    if not detach_min:
        at_least = (g.sum(1, keepdim=True) - maps.shape[1] * gbar) / divisor
        slope = slope.scatter_add(1, argmin, -at_least)
    slopes = torch.zeros_like(words)
    slopes[..., chosen] = slope.masked_fill(uniform, 0.0)
    grad = torch.zeros_like(maps)
    inner = (words * slopes).sum(-1, keepdim=True)
    grad[..., 1 : n_tokens + 1] = words * (slopes - inner) / tau * grad_loss[:, None, None]
    return grad


def _check(maps: Tensor, anchors: Sequence[int], n_tokens: int, tau: float, eps: float, weight: float) -> list[int]:
    """Check all arguments and return the anchors in increasing order."""
    if maps.ndim != 3 or not maps.shape[1]:
        raise ValueError(f"maps must be [batch, pixels, tokens] with at least one pixel, got {tuple(maps.shape)}")
    if maps.dtype not in DTYPES:
        raise ValueError(
            "maps must be float32 or float64 (in half precision many pixels tie at the minimum, which ruins the "
            f"gradient), got {maps.dtype}"
        )
    if type(n_tokens) is not int or not 1 <= n_tokens <= MAX_TOKENS:
        raise ValueError(f"n_tokens must be an int in 1 .. {MAX_TOKENS}, got {n_tokens!r}")
    if maps.shape[2] < n_tokens + 1:
        raise ValueError(
            f"maps must have a start token and n_tokens = {n_tokens} more columns, got {maps.shape[2]} in all"
        )
    columns = list(anchors)
    if not columns:
        raise ValueError("anchors must name at least one column, got none")
    for anchor in columns:
        if type(anchor) is not int or not 1 <= anchor <= n_tokens:
            raise ValueError(f"anchors must be ints in 1 .. n_tokens = {n_tokens}, got {anchor!r}")
    if len(set(columns)) < len(columns):
        raise ValueError(f"anchors must be distinct, got {columns}")
    # Comparisons, which NaN fails too: torch.compile traces them for symbolic numbers, unlike math.isfinite.
    if not _SMALLEST <= tau < math.inf:
        raise ValueError(f"tau must be at least {_SMALLEST:.3g} and finite, got {tau}")
    if not torch.finfo(maps.dtype).tiny <= eps < math.inf:
        raise ValueError(f"eps must be positive (a normal number in {maps.dtype}) and finite, got {eps}")
    if not -math.inf < weight < math.inf:
        raise ValueError(f"weight must be finite, got {weight}")
    return sorted(columns)


@_dispatch.remember
def choose(forced: Forced, dtype: torch.dtype, device: torch.device) -> str:
    """Return the backend for maps of this dtype on this device."""
    return _dispatch.choose("attention_entropy", forced, device, dtype, lambda backend: find_obstacle(backend, dtype))


def find_obstacle(backend: str, dtype: torch.dtype) -> str | None:
    """Say why a backend that exists here cannot serve maps of this dtype, or return None."""
    if backend == "triton" and dtype == torch.float64 and not _installed.INTERPRETED:
        # A compiled Triton kernel takes tau, eps and weight as float32.
        return "it takes float64 in the interpreter only"
    return None


# anchors increase.  shares [B, K, N]: p of each subject.  stats [B, K, 4]: S, sum(g) - N gbar, gbar, the subject's part
# of the loss; all 0 for a uniform column.  argmin [B, K]: the pixel that carries the gradient of min b, -1 for none.
_SCHEMA = (
    "(Tensor maps, int[] anchors, int n_tokens, float tau, float eps, float weight, bool detach_min) "
    "-> (Tensor loss, Tensor shares, Tensor stats, Tensor argmin)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_loss, Tensor maps, Tensor shares, Tensor stats, Tensor argmin, int[] anchors, int n_tokens, "
    "float tau, float eps, float weight) -> Tensor"
)
STATS = 4
_OPERATORS: dict[str, Any] = {}


def _fake(
    maps: Tensor, anchors: Sequence[int], n_tokens: int, tau: float, eps: float, weight: float, detach_min: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, pixels, _), subjects = maps.shape, len(anchors)
    return (
        maps.new_empty(batch),
        maps.new_empty(batch, subjects, pixels),
        maps.new_empty(batch, subjects, STATS),
        maps.new_empty(batch, subjects, dtype=torch.int64),
    )


def _fake_backward(
    grad_loss: Tensor,
    maps: Tensor,
    shares: Tensor,
    stats: Tensor,
    argmin: Tensor,
    anchors: Sequence[int],
    n_tokens: int,
    tau: float,
    eps: float,
    weight: float,
) -> Tensor:
    return maps.new_empty(maps.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # p is saved, not made anew: its differences from min b would amplify any difference in rounding between the two
    # passes, up to a negative p.
    maps, *ctx.rest, _detach_min = inputs
    ctx.save_for_backward(maps, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _define(backend: str) -> None:
    """Schemas, fakes and autograd of one backend."""
    name, library = f"attention_entropy.{backend}", LIBRARY
    backward_name = f"attention_entropy_backward.{backend}"
    library.define(name + _SCHEMA)
    library.define(backward_name + _BACKWARD_SCHEMA)
    torch.library.register_fake(f"difffast::{name}", _fake, lib=library)
    torch.library.register_fake(f"difffast::{backward_name}", _fake_backward, lib=library)
    _OPERATORS[backend] = getattr(torch.ops.difffast.attention_entropy, backend)
    operator = getattr(torch.ops.difffast.attention_entropy_backward, backend)

    def differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
        grad = None if grad_loss is None else operator(grad_loss, *ctx.saved_tensors, *ctx.rest)
        return grad, None, None, None, None, None, None

    torch.library.register_autograd(f"difffast::{name}", differentiate, setup_context=_save, lib=library)
    refuse_second_derivative("attention_entropy", backward_name)


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from difffast.triton_kernels import attention_entropy as kernels

    return kernels.forward(*arguments)


def _triton_backward(*arguments: Any) -> Tensor:
    from difffast.triton_kernels import attention_entropy as kernels

    return kernels.backward(*arguments)


_define("cpp")
_define("triton")
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("attention_entropy.triton", _triton_forward, _device)
    LIBRARY.impl("attention_entropy_backward.triton", _triton_backward, _device)
