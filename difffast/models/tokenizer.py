"""CLIP tokenizers with small vocabularies, made offline."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_BOS, _EOS, _END = "<|startoftext|>", "<|endoftext|>", "</w>"


def clip_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer; any text can be written in its vocabulary.

    Args:
        merges: pairs of tokens that become one, first come first.  None at all: one token per letter.
    """
    from transformers import CLIPTokenizer

    letters = _byte_alphabet()
    merged = dict.fromkeys(first + second for first, second in merges)
    tokens = [*letters, *(c + _END for c in letters), *merged, _BOS, _EOS]
    with tempfile.TemporaryDirectory() as folder:
        # from_pretrained reads the files on transformers 4 and 5 alike; 5 ignores the constructor's vocab_file.
        files = {
            "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
            "merges.txt": "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges),
            "tokenizer_config.json": json.dumps(
                {
                    "tokenizer_class": "CLIPTokenizer",
                    "model_max_length": 77,
                    "bos_token": _BOS,
                    "eos_token": _EOS,
                    "unk_token": _EOS,
                    "pad_token": _EOS,
                }
            ),
        }
        for file, text in files.items():
            Path(folder, file).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that write every one of some lower-case ASCII words as one token: byte-pair encoding without a limit.

    The same words give the same merges; the trainer of ``tokenizers`` breaks ties as its hash maps please.
    """
    spelled = [[*word[:-1], word[-1] + _END] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for parts in spelled for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(parts, best) for parts in spelled]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's byte-level BPE, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
