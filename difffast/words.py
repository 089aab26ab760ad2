"""The words of a prompt, and where they are among its tokens."""

from __future__ import annotations

import contextlib
import copy
import itertools
import string
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

#: Copies of tokenizers with what had been added to them, and locks.
_COPIES: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, int], threading.RLock]] = weakref.WeakKeyDictionary()
_COPYING = threading.Lock()

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


@contextlib.contextmanager
def tokenizer_apart(tokenizer: Any) -> Iterator[Any]:
    """Give a copy of a tokenizer, to one thread at a time.

    A fast tokenizer keeps how the latest call wanted its texts padded and cut, and a call that wants it otherwise while
    another thread's is at work fails.  The pipeline's own is therefore never called.
    """
    added = _read_added(tokenizer)
    with _COPYING:
        known = _COPIES.get(tokenizer)
        if known is None or known[1] != added:
            known = _COPIES[tokenizer] = copy.deepcopy(tokenizer), added, threading.RLock()
    with known[2]:
        yield known[0]


def convert_text(pipe: Any, tokenizer: Any, text: str) -> str:
    """Return what a pipeline gives its tokenizer for a text.

    Args:
        pipe: the pipeline; with textual inversion a word may stand for several vectors, each with a token.
        tokenizer: of :func:`tokenizer_apart`.
        text: the text.
    """
    if hasattr(pipe, "maybe_convert_prompt"):
        text = pipe.maybe_convert_prompt(text, tokenizer)
    return pipe._text_preprocessing(text)[0] if hasattr(pipe, "_text_preprocessing") else text  # DeepFloyd IF's


def find_vectors(token: str, added: Collection[str]) -> tuple[str, ...]:
    """Return an added token with those of its further vectors: "<cat>", "<cat>_1", ...; of others, the token alone."""
    if token not in added:
        return (token,)
    further = (f"{token}_{number}" for number in itertools.count(1))
    return (token, *itertools.takewhile(lambda each: each in added, further))


def is_further_vector(token: str, added: Collection[str]) -> bool:
    """Return whether a token stands for a vector of an added word, but not for its first."""
    return token in added and token in find_vectors(token.rpartition("_")[0], added)[1:]


def _read_added(tokenizer: Any) -> dict[str, int]:
    return dict(getattr(tokenizer, "added_tokens_encoder", {}))


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
    added = _read_added(tokenizer)
    with tokenizer_apart(tokenizer) as own:
        ids = own(text, truncation=True, max_length=longest or tokenizer.model_max_length).input_ids
        pieces = tuple(own.convert_ids_to_tokens(ids))
    special = set(tokenizer.all_special_ids)
    spoken = [position for position, each in enumerate(ids) if each not in special]

    def cut(word: str) -> list[str]:
        with tokenizer_apart(tokenizer) as own:
            tokens = [each for each in own.tokenize(word) if not is_further_vector(each, added)]
        return [vector for each in tokens for vector in find_vectors(each, added)]

    return Words(text, pieces, _group(pieces, spoken, added), cut)


def _group(
    pieces: Sequence[str], spoken: Sequence[int], added: Collection[str]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return words with their positions; a punctuation mark is a word, and so are all vectors of an added token."""
    groups: list[list[int]] = []
    for before, position in pairwise((None, *spoken)):
        piece = pieces[position]
        begins = before is None or pieces[before].endswith(_END) or piece.startswith(_STARTS)
        begins = begins or piece in added or pieces[before] in added or piece[:1] in string.punctuation
        if begins and not (groups and _goes_on(pieces[groups[-1][0]], len(groups[-1]), piece, added)):
            groups.append([])
        groups[-1].append(position)
    found = []
    for group in groups:
        first = pieces[group[0]]
        spelled = first if first in added else "".join(pieces[each] for each in group)
        found.append((spelled.removesuffix(_END).lstrip("".join(_STARTS)), tuple(group)))
    return tuple(found)


def _goes_on(first: str, length: int, piece: str, added: Collection[str]) -> bool:
    """Return whether a piece is the next vector of the added token ``first``, of which there have been ``length``."""
    return piece in find_vectors(first, added)[length : length + 1]
