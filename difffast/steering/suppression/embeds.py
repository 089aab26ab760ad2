"""Prompt embeddings without words that are not wanted, once a prompt."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..prompt_calls import encode_alone, read_prompt_words
from .regularise import regularise

if TYPE_CHECKING:
    from ...support import Pipeline


def suppress(
    pipe: Pipeline,
    prompt: str,
    words: str | Sequence[str],
    *,
    strengthen: bool = False,
    alpha: float = 1.0,
    reencode: bool = False,
) -> dict[str, Tensor]:
    """Return the embeddings of a prompt from which words are taken out: soft-weighted regularisation, no optimisation.

    Use them as ``pipe(**difffast.suppress(pipe, "a man with glasses", "glasses"))``.  It works on the embedding alone,
    so that it costs some milliseconds a prompt, whatever the schedule, and goes with every preset.

    Args:
        pipe: a pipeline with a text prompt: SD 1.x, SD 2.x, SDXL, DeepFloyd IF.  The embeddings of SDXL's two text
            encoders are regularised one by one, and its pooled embedding becomes that of the prompt without the words.
        prompt: one prompt.
        words: what is not wanted, each as the prompt writes it; several words in a row are one of them.  All places
            where the prompt has it count.
        strengthen: make the words stronger instead.  The pooled embedding stays.
        alpha: how fast large singular values fall (:func:`.regularise.regularise`).  DeepFloyd IF also reads the text
            through a norm per token, which undoes most of it.
        reencode: take the rows of the other words from the prompt without the words.  A text encoder puts into each row
            what stands before it: where words come early, those that follow speak of them as well.  More of the picture
            changes.

    Returns:
        The arguments of ``pipe(...)``, by name: ``prompt_embeds`` [1, T, D], for SDXL ``pooled_prompt_embeds`` as well.

    Raises:
        TypeError: ``prompt`` is not one text.
        ValueError: a word that is not in the prompt, no word at all, ``alpha`` negative or not finite, words to be both
            strengthened and taken out of the others' rows, or a pipeline
            without a tokenizer or with embeddings of another width than its text encoders'.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {type(prompt).__name__}")
    wanted = check_words(words)
    if not (isinstance(alpha, (int, float)) and 0 <= alpha < math.inf):
        raise ValueError(f"alpha must be finite and not negative, got {alpha!r}")
    if strengthen and reencode:
        raise ValueError("words that are strengthened must not be taken out of the others' rows: leave out reencode")
    rows = find_suppressed_rows(pipe, prompt, wanted)
    found = dict(encode_alone(pipe, prompt))
    if reencode:
        found["prompt_embeds"] = reencode_others(pipe, found["prompt_embeds"], prompt, wanted)
    found["prompt_embeds"] = regularise_text(found["prompt_embeds"], rows, strengthen=strengthen, alpha=alpha)
    if "pooled_prompt_embeds" in found and not strengthen:
        found["pooled_prompt_embeds"] = encode_alone(pipe, drop_words(prompt, wanted))["pooled_prompt_embeds"]
    return found


def check_words(words: str | Sequence[str]) -> tuple[str, ...]:
    """Return the words as a tuple.

    Raises:
        ValueError: there is none, or one is no text.
    """
    found = (words,) if isinstance(words, str) else tuple(words)
    if not found or not all(isinstance(word, str) and word.strip() for word in found):
        raise ValueError(f"words must be at least one word of the prompt, got {words!r}")
    return found


def find_suppressed_rows(pipe: Any, prompt: str, words: Sequence[str]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Return, for each text encoder, the words' rows with the number of the first end token's, and its channels.

    The rows from the first end token on are regularised as well; its number is the last of the tuple.

    Raises:
        ValueError: a word that is not in the prompt.
    """
    found = []
    for read, width in read_prompt_words(pipe, prompt):
        positions = {position for word in words for position in read.find(word)}
        found.append(((*sorted(positions), len(read.pieces) - 1), width))
    return tuple(found)


def regularise_text(
    text: Tensor, rows: Sequence[tuple[tuple[int, ...], int]], *, strengthen: bool = False, alpha: float = 1.0
) -> Tensor:
    """Return embeddings [B, T, D] whose rows of :func:`find_suppressed_rows` are regularised, image by image.

    Raises:
        ValueError: the text encoders' channels do not add up to D.
    """
    widths = [width for _, width in rows] if len(rows) > 1 else [text.shape[2]]
    if sum(widths) != text.shape[2]:
        raise ValueError(f"the text encoders give {widths} channels, but the embeddings have {text.shape[2]}")
    changed = text.clone()
    for part, (positions, _) in zip(changed.split(widths, 2), rows, strict=True):
        chosen = [*positions[:-1], *range(positions[-1], text.shape[1])]
        for image in part:
            image[chosen] = regularise(image[chosen], strengthen=strengthen, alpha=alpha)
    return changed


def reencode_others(pipe: Any, text: Tensor, prompt: str, words: Sequence[str], **options: Any) -> Tensor:
    """Return a prompt's embeddings [B, T, D] with the rows of all words but some from the prompt without these.

    ``options`` are those that ``text`` was encoded with, as :func:`~difffast.steering.prompt_calls.encode_alone` takes
    them.

    Raises:
        ValueError: the prompt without the words is cut into other pieces.
    """
    without = drop_words(prompt, words)
    other, changed = encode_alone(pipe, without, **options)["prompt_embeds"], text.clone()
    encoders = read_prompt_words(pipe, prompt)
    widths = [width for _, width in encoders] if len(encoders) > 1 else [text.shape[2]]
    parts = zip(
        encoders, read_prompt_words(pipe, without), changed.split(widths, 2), other.split(widths, 2), strict=True
    )
    for (read, _), (short, _), part, own in parts:
        removed = {position for word in words for position in read.find(word)}
        kept = [each for _, positions in read.words for each in positions if each not in removed]
        taken = [each for _, positions in short.words for each in positions][: len(kept)]
        if [read.pieces[each] for each in kept] != [short.pieces[each] for each in taken]:
            raise ValueError(f"{without!r} is cut into other pieces than the same words of {prompt!r}")
        part[:, kept] = own[:, taken].to(part)
    return changed


def drop_words(prompt: str, words: Sequence[str]) -> str:
    """Return a prompt without words, wherever it has them."""
    for word in sorted(words, key=len, reverse=True):  # "red circle" before "red", which would leave a circle
        # Tokenizers cut at punctuation, with spaces there or without.
        parts = re.findall(r"\w+|[^\w\s]", word)
        gaps = (r"\s+" if re.match(r"\w", a) and re.match(r"\w", b) else r"\s*" for a, b in pairwise(parts))
        inner = "".join(itertools.chain.from_iterable(zip(map(re.escape, parts), (*gaps, ""), strict=True)))
        prompt = re.sub(rf"(?<!\w){inner}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())
