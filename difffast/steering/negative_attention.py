"""NegativeAttention: negative prompts without classifier-free guidance (Normalized Attention Guidance, 2505.21179).

In every cross-attention layer, the same queries attend to the prompt, Z+, and to the negative prompt, Z-:
    G = s Z+ - (s - 1) Z-,    r = ||G||_1 / ||Z+||_1,    out = alpha G min(r, tau) / r + (1 - alpha) Z+
The norms are over all channels of a token, and the output projection follows.  The UNet's batch does not grow.  Both
texts' keys and values are made once a prompt.
Source: Normalized Attention Guidance (arXiv 2505.21179), section 3, equations 5 to 7.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.context import CrossCall
from ..layers.cross_attention import find_layers, has_added_keys
from ..layers.text_kv import TextKV
from ..sampling.extension import Extension, ExtensionRun, Method, RunInfo
from ..support import denoiser_of, support_of
from ..surgery.subclass import plain_class
from .prompt_calls import PromptCall, encode_alone, watch_encode_prompt


@dataclass(frozen=True)
class NegativeAttention(Method):
    """Give negative prompts effect inside attention, also without guidance: for Turbo, Lightning, LCM and Hyper-SD.

    Patch with ``difffast.patch(pipe, steering=difffast.NegativeAttention())``, then call
    ``pipe(prompt, negative_prompt="blurry", guidance_scale=1.0)``.  Without a negative prompt it is the empty one.
    With guidance, the conditional half of the batch is changed.  SDXL's ``negative_prompt_2`` is used as well.

    Args:
        scale: s, how far to go from the negative prompt; 1 is off, and changes no bit.
        tau: the most that the norm of a token may grow by, at least 1.
        alpha: the share of the result, 0 .. 1; 0 is off, and changes no bit.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    scale: float = 5.0
    tau: float = 1.5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
        if not 1 <= self.scale < math.inf or not 1 <= self.tau < math.inf:
            raise ValueError(f"scale and tau must be finite and at least 1, got {self.scale} and {self.tau}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0 .. 1, got {self.alpha}")

    def attach(self, pipe: Any, unet: nn.Module) -> NegativeTexts:
        refuse_attention_edits(pipe, unet)
        return NegativeTexts(self, pipe)


def refuse_attention_edits(pipe: Any, unet: nn.Module, *, added_keys: bool = False) -> None:
    """Refuse a pipeline whose cross-attention layers cannot be edited.

    Args:
        pipe: the pipeline.
        unet: its plain UNet.
        added_keys: whether layers that attend to pixels as well will do, because their text alone is edited.

    Raises:
        ValueError: there are none, they attend to pixels as well, the text does not reach them as it was given, or the
            batch is not the prompts' rows after those of the negative prompts.
    """
    layers = find_layers(unet)
    support = support_of(plain_class(pipe))
    if not layers or (not added_keys and any(map(has_added_keys, layers.values()))):
        raise ValueError(
            f"{type(unet).__name__} has no attention to the text alone, so that it cannot be edited (DeepFloyd IF's "
            "layers attend to text and pixels in one softmax)"
        )
    text = denoiser_of(type(unet)).text
    if text != "given":
        raise ValueError(f"the attention of a {type(unet).__name__} cannot be edited: its layers get the text {text}")
    if support is not None and support.guidance:
        raise ValueError(f"the attention of {type(pipe).__name__} cannot be edited: {support.guidance}")


class NegativeTexts(Extension):
    """NegativeAttention in one pipeline, between its calls."""

    edits_attention = True

    def __init__(self, config: NegativeAttention, pipe: Any) -> None:
        self._config, self._watch = config, watch_encode_prompt(pipe, self._read)
        self._read_by: dict[int, tuple[PromptCall, Tensor]] = {}  # by thread

    def describe(self) -> Iterator[tuple[str, str]]:
        c = self._config
        yield "attn2", f"negative prompts inside attention, scale {c.scale}, tau {c.tau}, alpha {c.alpha}"

    def pipeline_methods(self) -> Mapping[str, Callable[..., Any]]:
        return {"encode_prompt": self._watch}

    def begin(self, info: RunInfo) -> NegativeRun | None:
        found = self._read_by.pop(threading.get_ident(), None)
        if self._config.scale == 1 or self._config.alpha == 0:
            return None
        if found is None:
            info.note("no negative attention: this run's prompt has not been through pipe.encode_prompt")
            return None
        return NegativeRun(self._config, *found, info)

    def _read(self, pipe: Any, call: PromptCall) -> None:
        if call.negative_embeds is not None:
            negative = call.negative_embeds
        else:
            # As in guidance, where clip_skip is for the prompt alone.
            options = {name: value for name, value in call.options.items() if name != "clip_skip"}
            pairs = _pair_negatives(call)
            negative = torch.cat([encode_alone(pipe, *texts, **options)["prompt_embeds"] for texts in pairs])
        if len(negative) not in (1, call.count):
            raise ValueError(f"{call.count} prompts need 1 negative prompt or {call.count}, got {len(negative)}")
        self._read_by[threading.get_ident()] = call, negative.detach()


def _pair_negatives(call: PromptCall) -> list[tuple[str, str]]:
    """Return the negative prompts of both text encoders; without any, the empty one.

    Raises:
        ValueError: some encoder has neither one nor as many as the other.
    """
    first, second = call.negative or ("",), call.negative_second or ("",)
    most = max(len(first), len(second))
    if {len(first), len(second)} - {1, most}:
        raise ValueError(
            f"negative_prompt_2 needs one text or as many as negative_prompt, got {len(second)} and {len(first)}"
        )
    return list(zip(*(each * (most // len(each)) for each in (first, second)), strict=True))


class NegativeRun(ExtensionRun):
    """NegativeAttention in one run; it is its edit as well, which is the same at every step."""

    def __init__(self, config: NegativeAttention, call: PromptCall, negative: Tensor, info: RunInfo) -> None:
        self._config, self._call, self._info = config, call, info
        self._negative = negative
        self._kv: TextKV | None = None
        self._text: Any = None
        self._active = True

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call as it is, after a look at whose text it has."""
        text = call.get("encoder_hidden_states")
        if text is not self._text:
            self._text, self._active = text, self._call.find_rows(text) is not None
            if not self._active:
                self._info.note("no negative attention from here on: the text is not the encoded prompt's")
            elif self._kv is None:
                self._kv = TextKV(self._negative.to(text), Counter())
        return call

    def attention(self, step: int) -> NegativeRun | None:
        return self if self._active else None

    def edits_cross(self, name: str) -> bool:
        """Every layer is changed."""
        return True

    def share_rows(self, name: str, rows: int, pixels: int) -> Sequence[int] | None:
        """Self-attention stays."""
        return None

    def attend(self, call: CrossCall, own: Callable[[], Tensor]) -> Tensor:
        """Return the layer's own attention, with the prompts' rows led away from the negative prompts'."""
        out, rows = own(), len(self._call.embeds) * call.repeats
        negative = call.attend(call.query[-rows:], *call.project(self._kv))
        config = self._config
        guided = lead_away(out[-rows:], negative, config.scale, config.tau, config.alpha)
        if rows == len(out):
            return guided
        out[-rows:] = guided
        return out


def lead_away(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Return the formula at the top for Z+ and Z- [B, H, N, d], by head; 0 / 0 gives no NaN.

    min(r, tau) / r is min(1, tau ||Z+|| / ||G||).  Norms are summed in float32 at least.
    """
    precise = torch.promote_types(positive.dtype, torch.float32)
    guided = torch.lerp(negative, positive, scale)  # Z- + s (Z+ - Z-)
    limit = tau * positive.abs().sum((1, 3), keepdim=True, dtype=precise)
    size = guided.abs().sum((1, 3), keepdim=True, dtype=precise)
    share = torch.where(size > limit, limit / size, 1.0).to(positive.dtype)
    return torch.lerp(positive, guided.mul_(share), alpha)
