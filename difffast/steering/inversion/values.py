"""What an inversion by StyleDiffusion makes of a text's values, and its replay in stock calls."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.context import CrossCall
from ...layers.text_kv import TextKV
from ...sampling.extension import Extension, ExtensionRun, RunInfo
from ..prompt_calls import is_guided
from .networks import make_network


class ValueTexts:
    """What gives the values in place of a text, at every step of an inversion by "style".

    Args:
        features: [P, D], tokens of the picture.
        networks: by parameter, [steps, ...].
    """

    @torch.no_grad()
    def __init__(self, features: Tensor, networks: Mapping[str, Tensor]) -> None:
        self._steps, rows = networks["last.bias"].shape
        network = make_network(features, rows // 2)
        found = []
        for step in range(self._steps):
            network.load_state_dict({name: each[step] for name, each in networks.items()})
            found.append(network(features))
        #: gamma and beta [T, D] of every step.
        self._scales = found

    def check(self, info: RunInfo) -> None:
        """Refuse a run with another schedule than the inversion's.

        Raises:
            ValueError: it has another number of steps.
        """
        check_steps(self._steps, info)

    def mix(self, text: Tensor, step: int) -> Tensor:
        """Return c gamma + beta for texts c [B, T, D], from which values are made.

        Raises:
            ValueError: the texts are not of the inversion's size.
        """
        gamma, beta = (each.to(text.device) for each in self._scales[step])
        if text.shape[1:] != gamma.shape:
            raise ValueError(f"the inversion is for texts of {tuple(gamma.shape)}, got {tuple(text.shape[1:])}")
        return (text * gamma + beta).to(text.dtype)


def check_steps(steps: int, info: RunInfo) -> None:
    """Refuse a run with another number of steps than its inversion.

    Raises:
        ValueError: it has.
    """
    if info.total != steps:
        raise ValueError(
            f"a picture inverted in {steps} steps needs as many, got {info.total}: call the pipeline with "
            "**inversion.arguments"
        )


def swap_values(call: CrossCall, kv: TextKV) -> CrossCall:
    """Return a layer's call whose last rows have the values of another text, as many as it has rows."""
    values = call.project(kv)[1]
    return dataclasses.replace(call, values=torch.cat([call.values[: -len(values)], values]))


def note_guidance(info: RunInfo, pipe: Any, guidance: float) -> None:
    """Say so where a call of ``pipe`` has another guidance than the one for which an inversion was optimised."""
    scale, rescale = getattr(pipe, "guidance_scale", guidance), getattr(pipe, "guidance_rescale", 0.0)
    if scale != guidance or rescale:
        info.note(
            f"the inversion was optimised for guidance_scale {guidance} and no guidance_rescale, this call has {scale} "
            f"and {rescale}: its picture is not made again"
        )


class StyleReplay(Extension):
    """An inversion by "style" in one pipeline.

    Args:
        texts: what gives the values.
        guidance: the guidance scale of the inversion, for loops that are not the pipeline's.
        pipe: the pipeline; only a weak reference is kept.
    """

    alone = True
    edits_attention = True

    def __init__(self, texts: ValueTexts, guidance: float, pipe: Any) -> None:
        self._texts, self._guidance, self._pipe = texts, guidance, weakref.ref(pipe)
        self._called: set[int] = set()  # threads

    def see_call(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._called.add(threading.get_ident())

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "attn2", "values of a picture inverted by 'style'"

    def full_steps(self, total: int) -> Sequence[int]:
        return range(total)

    def begin(self, info: RunInfo) -> StyleRun:
        """Begin a run.

        Raises:
            ValueError: its schedule is not the inversion's.
        """
        self._texts.check(info)
        called = threading.get_ident() in self._called
        self._called.discard(threading.get_ident())
        if called:
            note_guidance(info, self._pipe(), self._guidance)
        return StyleRun(self._texts, is_guided(self._pipe() if called else None, self._guidance))


class StyleRun(ExtensionRun):
    """An inversion by "style" in one run; it is its edit of attention as well, at every step."""

    def __init__(self, texts: ValueTexts, guided: bool) -> None:
        self._texts, self._guided = texts, guided
        self._kv: TextKV | None = None

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call as it is; its conditional half's values are made."""
        text = call["encoder_hidden_states"]
        first = len(text) // 2 if self._guided and len(text) % 2 == 0 else 0
        self._kv = TextKV(self._texts.mix(text[first:], step), Counter())
        return call

    def attention(self, step: int) -> StyleRun:
        return self

    def edits_cross(self, name: str) -> bool:
        """Every layer is changed."""
        return True

    def share_rows(self, name: str, rows: int, pixels: int) -> Sequence[int] | None:
        """Self-attention stays."""
        return None

    def attend(self, call: CrossCall, own: Callable[[], Tensor]) -> Tensor:
        """Return the layer's attention with the values of the step's texts."""
        if call.watched:
            own()  # which hands out the maps; these do not depend on values
        changed = swap_values(call, self._kv)
        return call.attend(changed.query, changed.keys, changed.values)
