"""From ``pipe.encode_prompt`` to the run that uses it: what the stock call encodes, and what binding needs besides."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..surgery.subclass import plain_class
from .prompts import MarkedPrompt, parse_prompt


@dataclass(frozen=True)
class EncodedPrompts:
    """The prompts of one call.

    Attributes:
        marked: per prompt, its subjects.
        embeds: [prompts * images_per_prompt, T, D], as the pipeline was given them.
        images_per_prompt: neighbouring rows of ``embeds`` that are equal.
        phrases: per prompt, its subjects alone, [K, T, D]; None where nothing is marked.
        simplified: per prompt, the simplified prompt [T, D]; None where nothing is marked.
    """

    marked: tuple[MarkedPrompt, ...]
    embeds: Tensor
    images_per_prompt: int
    phrases: tuple[Tensor | None, ...]
    simplified: tuple[Tensor | None, ...]


def override_encode_prompt(
    pipe: Any, subjects: Sequence[Any] | None, remember: Callable[[EncodedPrompts], None]
) -> Callable[..., Any]:
    """Return an ``encode_prompt`` that reads marks, encodes the text without them, and lets ``remember`` keep the rest.

    Works for pipelines of one and of two text encoders.
    """
    plain = plain_class(pipe).encode_prompt
    # Pipelines read signatures to see what a method accepts: it must stay visible.
    signature = inspect.signature(plain)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        prompt, second = arguments.get("prompt"), arguments.get("prompt_2")
        if prompt is None or arguments.get("prompt_embeds") is not None:
            raise ValueError("semantic binding needs the prompt as text, got prompt_embeds (or no prompt)")
        if second is not None and second != prompt:
            raise ValueError(f"semantic binding needs one prompt for both text encoders, got {prompt!r} and {second!r}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if subjects is not None and len(prompts) > 1:
            raise ValueError(f"subjects are for one prompt, got {len(prompts)}: mark the prompts by square brackets")
        marked = tuple(parse_prompt(self, each, subjects) for each in prompts)
        if not any(each.subjects for each in marked):
            warnings.warn(
                'difffast: no semantic binding: nothing is marked, as in "a [black cat] and a [white dog]"',
                stacklevel=2,
            )

        def encode(texts: list[str], **others: Any) -> Any:
            given = {**arguments, **others}
            del given["self"]
            extra = given.pop("kwargs", {})
            given["prompt"] = texts
            if second is not None:
                given["prompt_2"] = texts
            return plain(self, **given, **extra)

        def alone(texts: list[str]) -> Tensor:
            return encode(texts, num_images_per_prompt=1, do_classifier_free_guidance=False)[0].detach()

        result = encode([each.text for each in marked])
        remember(
            EncodedPrompts(
                marked,
                result[0],
                result[0].shape[0] // len(marked),
                tuple(alone([g.phrase for g in each.subjects]) if each.subjects else None for each in marked),
                tuple(alone([each.simplified])[0] if each.subjects else None for each in marked),
            )
        )
        return result

    encode_prompt.__signature__ = signature
    encode_prompt.__doc__ = plain.__doc__
    return encode_prompt
