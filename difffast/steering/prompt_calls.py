"""What a pipeline's ``encode_prompt`` is called with and what it returns, for methods that need the prompt's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surgery.subclass import plain_class
from ..words import Words, read_words

#: DeepFloyd IF's tokenizer knows no limit, and the pipeline has this one.
_DEEPFLOYD_TOKENS = 77


@dataclass(frozen=True)
class PromptCall:
    """One call of ``encode_prompt``.

    Attributes:
        prompts: the prompts as text; empty where the pipeline was given embeddings.
        embeds: [prompts * images_per_prompt, T, D], the embeddings of the prompts as the pipeline was given them.
        negative: the negative prompts as text; empty where there are none, or embeddings were given.
        negative_embeds: the negative embeddings that the pipeline was given, or None.
    """

    prompts: tuple[str, ...]
    embeds: Tensor
    negative: tuple[str, ...]
    negative_embeds: Tensor | None

    def find_rows(self, text: Any) -> int | None:
        """Return where the prompts' rows begin in a UNet call's text, whose last rows they are; None: they are not."""
        embeds = self.embeds
        if not isinstance(text, Tensor) or text.shape[1:] != embeds.shape[1:] or len(text) % len(embeds):
            return None
        return len(text) - len(embeds) if torch.equal(text[-len(embeds) :], embeds.to(text)) else None


def watch_encode_prompt(pipe: Any, remember: Callable[[Any, PromptCall], None]) -> Callable[..., Any]:
    """Return an ``encode_prompt`` that does what the stock one does and tells ``remember`` of it.

    Args:
        pipe: the pipeline.
        remember: takes the pipeline and the call.

    Raises:
        ValueError: the pipeline has no ``encode_prompt``.
    """
    plain = getattr(plain_class(pipe), "encode_prompt", None)
    if plain is None:
        raise ValueError(f"a method that reads prompts needs encode_prompt, and {type(pipe).__name__} has none")
    # Pipelines read signatures to see what a method accepts: it must stay visible.
    signature = inspect.signature(plain)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        result = plain(self, *args, **kwargs)
        prompts = () if given.get("prompt_embeds") is not None else _as_texts(given.get("prompt"))
        embeds = given.get("negative_prompt_embeds")
        negative = () if embeds is not None else _as_texts(given.get("negative_prompt"))
        remember(self, PromptCall(prompts, result[0], negative, embeds))
        return result

    encode_prompt.__signature__ = signature
    encode_prompt.__doc__ = plain.__doc__
    return encode_prompt


def read_arguments(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a call of a pipeline by name, with defaults; none where they do not fit."""
    try:
        bound = inspect.signature(plain_class(pipe).__call__).bind(pipe, *args, **kwargs)
    except TypeError:  # which the pipeline will say better
        return {}
    bound.apply_defaults()
    return bound.arguments


def count_images(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return how many images a call of a pipeline makes of each prompt."""
    return read_arguments(pipe, args, kwargs).get("num_images_per_prompt") or 1


def is_guided(pipe: Any, guidance: float) -> bool:
    """Return whether a call has guidance: what its pipeline says, or where it does not, whether the scale is not 1."""
    return bool(getattr(pipe, "do_classifier_free_guidance", guidance != 1))


def encode_alone(pipe: Any, text: str) -> Mapping[str, Tensor]:
    """Return what a pipeline makes of one text, without guidance, as arguments of its call.

    Raises:
        ValueError: the pipeline has no ``encode_prompt``, or the text encoder's result is not finite.
    """
    plain = getattr(plain_class(pipe), "encode_prompt", None)
    if plain is None:
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt")
    taken = inspect.signature(plain).parameters
    given = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        result = plain(pipe, prompt=text, **{name: value for name, value in given.items() if name in taken})
    found = {"prompt_embeds": result[0]}
    if len(result) == 4:  # prompt, negative prompt, and both pooled
        found["pooled_prompt_embeds"] = result[2]
    for name, each in found.items():
        if not bool(each.isfinite().all()):
            raise ValueError(f"the text encoder's {name} of {text!r} are not finite")
    return found


def read_prompt_words(pipe: Any, text: str) -> tuple[tuple[Words, int], ...]:
    """Return, for each text encoder, the words of a prompt and how many channels of the embedding are its own.

    Raises:
        ValueError: the pipeline has no tokenizer, or one that pads on the left.
    """
    found = []
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        own, longest = text, None
        if hasattr(pipe, "maybe_convert_prompt"):
            own = pipe.maybe_convert_prompt(own, tokenizer)  # textual inversion: one word may stand for several vectors
        if hasattr(pipe, "_text_preprocessing"):
            own, longest = pipe._text_preprocessing(own)[0], _DEEPFLOYD_TOKENS
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        config = getattr(encoder, "config", None)
        width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0)
        found.append((read_words(tokenizer, own, longest), width))
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no tokenizer")
    return tuple(found)


def _as_texts(prompt: Any) -> tuple[str, ...]:
    return () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
