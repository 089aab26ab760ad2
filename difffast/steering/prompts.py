"""Marked prompts: which words of a prompt belong together, as positions in the tokenised text.

    a [cat wearing sunglasses] and a [red *car with a door]

Square brackets enclose a subject with all that is said of it.  Its noun is the word (or the neighbouring words) with a
star; without one, the last word before the first of ``INTRODUCERS`` ("wearing", "with", ...), or the last of all.  In a
prompt without brackets a star is a character like any other.

The subjects, a phrase for each, and the prompt without modifiers, which ToMe (arXiv 2411.07132) asks for one by one,
follow.

Position 0 is the start token, 1 .. n are the word pieces; all pieces of a word count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..words import convert_text, is_further_vector, tokenizer_apart

#: Words after which only attributes follow.  "-ing" alone would not do: king, ring.
INTRODUCERS = frozenset(
    re.findall(
        r"\w+",
        "wearing holding carrying riding eating playing standing sitting made having that which who and "
        "with without in on of at by under over above below beside behind near from inside",
    )
)
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Subject:
    """One subject of a prompt.

    Attributes:
        nouns: positions of its noun's pieces, increasing.
        modifiers: positions of all that is said of it, increasing; may be empty.
        phrase: the subject as a prompt of its own, "a cat wearing sunglasses".
    """

    nouns: tuple[int, ...]
    modifiers: tuple[int, ...]
    phrase: str

    @property
    def anchor(self) -> int:
        """Where the composite token goes: the noun's first piece."""
        return self.nouns[0]

    @property
    def absorbed(self) -> tuple[int, ...]:
        """The other positions, increasing: they become part of the composite token."""
        return tuple(sorted({*self.nouns, *self.modifiers} - {self.anchor}))


@dataclass(frozen=True)
class MarkedPrompt:
    """A prompt with its subjects.

    Attributes:
        text: what is encoded, without marks.
        subjects: the subjects, in the order of the text; none: an ordinary prompt.
        simplified: the prompt with nouns alone in place of the subjects, "a cat and a dog".
        length: word pieces of ``text``, n.
        simplified_length: word pieces of ``simplified``.
    """

    text: str
    subjects: tuple[Subject, ...]
    simplified: str
    length: int
    simplified_length: int


def parse_prompt(pipe: Any, prompt: str, subjects: Sequence[Sequence[Sequence[int]]] | None = None) -> MarkedPrompt:
    """Find the subjects of a prompt.

    Args:
        pipe: a pipeline with a ``tokenizer``, and perhaps a ``tokenizer_2``, which must then agree.
        prompt: the text, with subjects in square brackets (a literal bracket cannot be written), or without any.
        subjects: (nouns, modifiers) of each subject as positions (see :func:`get_indices`), instead of brackets.

    Raises:
        ValueError: brackets that do not match, are empty or cut a word; beside brackets, a star right before a word
            outside them; several nouns; positions out of range or in two subjects; a prompt too long for the text
            encoder; tokenizers that disagree.
    """
    if subjects is None:
        pieces = _pieces(prompt)
        text = "".join(piece.text for piece in pieces)
        nouns, modifiers, length = _positions(pipe, pieces, text)
        found = tuple(
            Subject(nouns[k], modifiers.get(k, ()), _phrase(pieces, k))
            for k in dict.fromkeys(p.subject for p in pieces)
            if k is not None
        )
        simplified = _simplify(pieces)
    else:
        text, length = prompt, len(_tokens(pipe, prompt))
        found = _explicit(pipe, prompt, subjects, length)
        dropped = {position for subject in found for position in subject.modifiers}
        simplified = _decode(pipe, prompt, [i for i in range(1, length + 1) if i not in dropped])
    return MarkedPrompt(text, found, simplified, length, len(_tokens(pipe, simplified)))


def get_indices(pipe: Any, prompt: str) -> dict[int, str]:
    """Positions of a prompt's word pieces, as the pipeline's tokenizers see them; marks are left out.

    Raises:
        ValueError: as :func:`parse_prompt`.
    """
    return dict(enumerate(_tokens(pipe, strip_marks(prompt)), 1))


def strip_marks(prompt: str) -> str:
    """Return a prompt as it is encoded, without its marks.

    Raises:
        ValueError: brackets and stars that :func:`parse_prompt` cannot read.
    """
    return "".join(piece.text for piece in _pieces(prompt))


@dataclass(frozen=True)
class _Piece:
    """A stretch of text; ``subject`` is None outside brackets."""

    text: str
    subject: int | None = None
    noun: bool = False


def _pieces(prompt: str) -> list[_Piece]:
    parts = re.split(r"\[([^\[\]]*)\]", prompt)  # outside, inside, outside, ...
    for number, part in enumerate(parts):
        if number % 2 == 0 and ("[" in part or "]" in part):
            raise ValueError(f"square brackets must match and not be nested, got {prompt!r}")
    pieces: list[_Piece] = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            starred = re.search(r"(?<!\S)\*\w+", part) if len(parts) > 1 else None
            if starred:
                raise ValueError(
                    f"a star names a noun inside square brackets, got {starred[0]!r} outside in {prompt!r}"
                )
            pieces += [_Piece(part)] if part else []
            continue
        words = part.split()
        if not words:
            raise ValueError(f"square brackets must enclose a subject, got {prompt!r}")
        nouns = _nouns(words, part)
        for i, word in enumerate(words):
            pieces += [_Piece(" ")] if i else []
            pieces.append(_Piece(word.removeprefix("*"), number // 2, i in nouns))
    return pieces


def _nouns(words: Sequence[str], part: str) -> Sequence[int]:
    starred = [i for i, word in enumerate(words) if word.startswith("*")]
    if any(words[i] == "*" for i in starred):
        raise ValueError(f"a star must stand right before a word, got [{part}]")
    if starred:
        if starred != list(range(starred[0], starred[-1] + 1)):
            raise ValueError(f"a subject has one noun, so that starred words must be neighbours, got [{part}]")
        return starred
    end = next((i for i, word in enumerate(words) if i and word.lower().strip(",") in INTRODUCERS), len(words))
    return [end - 1]


def _positions(
    pipe: Any, pieces: Sequence[_Piece], text: str
) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]], int]:
    """-> (positions of the nouns, and of the modifiers, by subject; number of word pieces in all)"""
    whole, parts = _tokens(pipe, text), [_tokens(pipe, piece.text) for piece in pieces]
    if [token for part in parts for token in part] != whole:
        raise ValueError(f"square brackets must enclose whole words, got {text!r} cut as {[p.text for p in pieces]}")
    found: tuple[dict[int, tuple[int, ...]], ...] = ({}, {})
    position = 1
    for piece, part in zip(pieces, parts, strict=True):
        if piece.subject is not None:
            of_kind = found[0 if piece.noun else 1]
            of_kind[piece.subject] = (*of_kind.get(piece.subject, ()), *range(position, position + len(part)))
        position += len(part)
    return *found, len(whole)


def _phrase(pieces: Sequence[_Piece], subject: int) -> str:
    """The text between a subject's brackets, with its article."""
    inside = [i for i, piece in enumerate(pieces) if piece.subject == subject]
    before = pieces[inside[0] - 1].text.split() if inside[0] else []
    article = [before[-1]] if before and before[-1].lower() in _ARTICLES else []
    return " ".join([*article, *(pieces[i].text for i in inside)])


def _simplify(pieces: Sequence[_Piece]) -> str:
    """The text with nouns alone in the subjects' places; "a" and "an" follow the noun."""
    text = ""
    for subject, piece in ((p.subject, p) for p in pieces):
        if subject is None:
            text += piece.text
        elif piece.noun:
            article = re.search(r"\b(a|an)\s+$", text, re.IGNORECASE)
            if article:
                letter = article[1][0]
                text = text[: article.start()] + letter + ("n " if piece.text[:1].lower() in "aeiou" else " ")
            text += piece.text if text.endswith(" ") or not text else f" {piece.text}"
    return " ".join(text.split())


def _explicit(pipe: Any, prompt: str, subjects: Sequence[Sequence[Sequence[int]]], length: int) -> tuple[Subject, ...]:
    seen: set[int] = set()
    found = []
    for pair in subjects:
        nouns, modifiers = (tuple(sorted(part)) for part in pair)
        if not nouns:
            raise ValueError(f"a subject needs the position of a noun, got {pair!r}")
        positions = sorted({*nouns, *modifiers})
        if len(positions) < len(nouns) + len(modifiers) or seen & set(positions):
            raise ValueError(f"a position can be in one subject once, got {subjects!r}")
        if positions[0] < 1 or positions[-1] > length:
            raise ValueError(f"positions of {prompt!r} must lie in 1 .. {length}, got {positions}")
        seen.update(positions)
        found.append(Subject(nouns, modifiers, _decode(pipe, prompt, positions)))
    return tuple(found)


def _decode(pipe: Any, prompt: str, positions: Sequence[int]) -> str:
    tokenizer = _tokenizers(pipe)[0]
    ids, added = _ids(pipe, tokenizer, prompt), getattr(tokenizer, "added_tokens_encoder", {})
    chosen = [ids[position - 1] for position in positions]
    # The pipeline puts further vectors of a word in again.
    chosen = [each for each in chosen if not is_further_vector(tokenizer.convert_ids_to_tokens(each), added)]
    return " ".join(tokenizer.decode(chosen).split())


def _tokens(pipe: Any, text: str) -> list[str]:
    """The word pieces of a text, on which all tokenizers of the pipeline agree."""
    spelled = []
    for tokenizer in _tokenizers(pipe):
        ids = _ids(pipe, tokenizer, text)
        room = tokenizer.model_max_length - 2
        if len(ids) > room:
            raise ValueError(f"a prompt may have {room} word pieces, got {len(ids)}: {text!r}")
        spelled.append(tokenizer.convert_ids_to_tokens(ids))
    if any(tokens != spelled[0] for tokens in spelled):
        raise ValueError(f"the pipeline's tokenizers cut {text!r} into different pieces: {spelled}")
    return spelled[0]


def _ids(pipe: Any, tokenizer: Any, text: str) -> list[int]:
    with tokenizer_apart(tokenizer) as own:
        return own(convert_text(pipe, own, text), add_special_tokens=False).input_ids


def _tokenizers(pipe: Any) -> list[Any]:
    found = [t for t in (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")) if t is not None]
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no tokenizer")
    return found
