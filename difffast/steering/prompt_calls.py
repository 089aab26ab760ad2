"""What a pipeline's ``encode_prompt`` is called with and what it returns, for methods that need the prompt's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surgery.subclass import plain_class
from ..words import Words, convert_text, read_words, tokenizer_apart

#: DeepFloyd IF's tokenizer knows no limit, and the pipeline has this one.
_DEEPFLOYD_TOKENS = 77
#: Arguments of ``encode_prompt`` that its result depends on besides the texts.
_OPTIONS = ("clip_skip", "lora_scale")


@dataclass(frozen=True)
class PromptCall:
    """One call of ``encode_prompt``.

    Attributes:
        prompts: the prompts as text; empty where the pipeline was given embeddings.
        second: those of the second text encoder; ``prompts`` where it has none of its own.
        embeds: [prompts * images_per_prompt, T, D], the embeddings of the prompts as the pipeline was given them.
        negative: the negative prompts as text; empty where there are none, or embeddings were given.
        negative_second: those of the second text encoder; ``negative`` where it has none of its own.
        negative_embeds: the negative embeddings that the pipeline was given, or None.
        count: how many prompts, as text or as embeddings.
        options: what else the embeddings depend on, by name: ``clip_skip``, ``lora_scale``.
    """

    prompts: tuple[str, ...]
    second: tuple[str, ...]
    embeds: Tensor
    negative: tuple[str, ...]
    negative_second: tuple[str, ...]
    negative_embeds: Tensor | None
    count: int
    options: Mapping[str, Any]

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
        embeds = given.get("negative_prompt_embeds")
        prompts = _read_texts(given, "prompt", given.get("prompt_embeds"))
        negative = _read_texts(given, "negative_prompt", embeds)
        count = len(prompts[0]) or len(given.get("prompt_embeds", result[0]))
        options = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
        remember(self, PromptCall(*prompts, result[0], *negative, embeds, count, options))
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


def encode_alone(pipe: Any, text: str, second: str | None = None, **options: Any) -> Mapping[str, Tensor]:
    """Return what a pipeline makes of one text, without guidance, as arguments of its call.

    Args:
        pipe: the pipeline.
        text: the text.
        second: another text for the second text encoder; None: the same.
        options: of :class:`PromptCall`.

    Raises:
        ValueError: the pipeline has no ``encode_prompt``, or the text encoder's result is not finite.
    """
    plain = getattr(plain_class(pipe), "encode_prompt", None)
    if plain is None:
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt")
    taken = inspect.signature(plain).parameters
    given = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given |= options
    if second is not None and second != text:
        # An empty text would be taken for none, so that both encoders had the first; a space has no tokens either.
        given["prompt_2"] = second or " "
    with torch.no_grad():
        result = plain(pipe, prompt=text, **{name: value for name, value in given.items() if name in taken})
    found = {"prompt_embeds": result[0]}
    if len(result) == 4:  # prompt, negative prompt, and both pooled
        found["pooled_prompt_embeds"] = result[2]
    for name, each in found.items():
        if not bool(each.isfinite().all()):
            raise ValueError(f"the text encoder's {name} of {text!r} are not finite")
    return found


def read_prompt_words(pipe: Any, text: str, second: str | None = None) -> tuple[tuple[Words, int], ...]:
    """Return, for each text encoder, the words of a prompt and how many channels of the embedding are its own.

    Args:
        pipe: the pipeline.
        text: the prompt.
        second: the second text encoder's; None: the same.

    Raises:
        ValueError: the pipeline has no tokenizer, or one that pads on the left.
    """
    found = []
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        # A pipeline without its first encoder (SDXL's refiner) gives the second one the first text.
        own = text if second is None or not found else second
        with tokenizer_apart(tokenizer) as apart:
            own = convert_text(pipe, apart, own)
        longest = _DEEPFLOYD_TOKENS if hasattr(pipe, "_text_preprocessing") else None
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        config = getattr(encoder, "config", None)
        width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0)
        found.append((read_words(tokenizer, own, longest), width))
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no tokenizer")
    return tuple(found)


def _read_texts(given: Mapping[str, Any], name: str, embeds: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts of both encoders by the argument's name, as many of each; none where there are embeddings."""
    if embeds is not None:
        return (), ()
    first, second = _as_texts(given.get(name)), _as_texts(given.get(f"{name}_2") or None)
    first = first or ("",) * len(second)
    return first, second or first


def _as_texts(prompt: Any) -> tuple[str, ...]:
    return () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
