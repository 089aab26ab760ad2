"""The words of a prompt, and where they are among its tokens."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

#: What CLIP's pieces end with at the end of a word, and what those of SentencePiece and GPT begin with at its start.
_END, _STARTS = "</w>", ("▁", "Ġ")


@dataclass(frozen=True)
class Words:
    """The words of one prompt.

    Attributes:
        text: the prompt.
        pieces: its tokens as the tokenizer writes them, those that mark its start and end among them.
        words: pairs of a word and the positions of its pieces, in the order of the text.
    """

    text: str
    pieces: tuple[str, ...]
    words: tuple[tuple[str, tuple[int, ...]], ...]
    _cut: Callable[[str], Sequence[str]] = field(repr=False, compare=False)

    def find(self, word: str) -> tuple[int, ...]:
        """Return the positions of a word, or of several in a row, wherever the prompt has it.

        Raises:
            ValueError: it has no such word.
        """
        wanted = tuple(self._cut(word))
        starts = {positions[0] for _, positions in self.words}
        ends = {positions[-1] for _, positions in self.words}
        found = [
            range(first, first + len(wanted))
            for first in range(len(self.pieces))
            if wanted
            and self.pieces[first : first + len(wanted)] == wanted
            and first in starts
            and first + len(wanted) - 1 in ends
        ]
        if not found:
            known = ", ".join(repr(each) for each, _ in self.words)
            raise ValueError(f"no word {word!r} in the prompt {self.text!r}, whose words are {known or 'none'}")
        return tuple(sorted({position for each in found for position in each}))


def read_words(tokenizer: Any, text: str, longest: int | None = None) -> Words:
    """Return the words of a prompt as a tokenizer cuts them; what is too long for the text encoder is left out.

    Args:
        tokenizer: the pipeline's.
        text: the prompt.
        longest: tokens that the pipeline gives its text encoder; None: as many as the tokenizer says.

    Raises:
        ValueError: the tokenizer fills short texts up from the left, so that positions depend on the length.
    """
    if tokenizer.padding_side == "left":
        raise ValueError(f"{type(tokenizer).__name__} pads on the left, so that words have no fixed positions")
    ids = tokenizer(text, truncation=True, max_length=longest or tokenizer.model_max_length).input_ids
    pieces = tuple(tokenizer.convert_ids_to_tokens(ids))
    spoken = [position for position, each in enumerate(ids) if each not in tokenizer.all_special_ids]
    return Words(text, pieces, _group(pieces, spoken), tokenizer.tokenize)


def _group(pieces: Sequence[str], spoken: Sequence[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return words with their positions; a punctuation mark is a word."""
    groups: list[list[int]] = []
    for before, position in pairwise((None, *spoken)):
        piece = pieces[position]
        begins = before is None or pieces[before].endswith(_END) or piece.startswith(_STARTS)
        if begins or piece[:1] in string.punctuation:
            groups.append([])
        groups[-1].append(position)
    spelled = ["".join(pieces[each] for each in group) for group in groups]
    words = [each.removesuffix(_END).lstrip("".join(_STARTS)) for each in spelled]
    return tuple((word, tuple(group)) for word, group in zip(words, groups, strict=True))
