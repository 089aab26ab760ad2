"""SafeGuard: keep concepts out of pictures without training, from the text alone (SAFREE, arXiv 2410.12761).

The pooled embeddings of the concepts' phrases span a space with the projector P_c.  Those of the prompt with one token
hidden at a time, m_i, span another one with the projector P.  A token whose hiding takes the prompt further from the
concepts than hiding another one does, ||(I - P_c) m_i|| >= 1.01 mean of the others', speaks of them: its row x becomes
(I - P_c) P x.  How long the changed text is used follows from how much it has changed: with b = 1 - the mean cosine
between old and new rows, at the steps up to 10 / (1 + exp(-2k (10 b - 5.333))) of 50, k = 2.5.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..sampling.extension import Extension, ExtensionRun, Method, RunInfo
from ..words import convert_text, tokenizer_apart
from .prompt_calls import PromptCall, read_prompt_words, watch_encode_prompt
from .suppression.embeds import check_words

#: Over the other tokens' mean distance, what makes a token speak of the concepts.
_MARGIN = 0.01
#: Most steps of 50; how sharply they grow with the change, and at which tenfold change half of them count.
_MOST, _SHARPNESS, _MIDDLE = 10, 2.5, 5.333
_STEPS = 50


@dataclass(frozen=True)
class SafeGuard(Method):
    """Keep concepts out of pictures: SAFREE, a filter of the prompt's embeddings that needs no training.

    Patch with ``difffast.patch(pipe, steering=difffast.SafeGuard(["blood", "a weapon"]))``; the stock call stays as it
    is.  The filter may change tokens of any prompt: ``report.trace`` says which, and for how many steps.

    Args:
        concepts: phrases that span what is not wanted.

    Raises:
        ValueError: no phrase.
    """

    concepts: str | Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", check_words(self.concepts))

    def attach(self, pipe: Any, unet: nn.Module) -> Guard:
        return Guard(self, pipe)


@dataclass
class GuardTrace:
    """What the guard did in the latest run.

    Attributes:
        tokens: per prompt, the positions of the tokens whose rows were changed, in any text encoder's prompt.
        steps: per prompt, at how many steps from the first the changed text is used.
    """

    tokens: tuple[tuple[int, ...], ...] = ()
    steps: tuple[int, ...] = ()


class Guard(Extension):
    """SafeGuard in one pipeline.

    Args:
        config: what to keep out.
        pipe: the pipeline.

    Raises:
        ValueError: a text encoder that is not CLIP's.
    """

    def __init__(self, config: SafeGuard, pipe: Any) -> None:
        self._config, self._watch = config, watch_encode_prompt(pipe, self._read)
        self._concepts = [
            span(torch.stack([pool_text(encoder, _read_ids(pipe, tokenizer, each)) for each in config.concepts]))
            for encoder, tokenizer in _find_encoders(pipe)
        ]
        self._read_by: dict[int, tuple[PromptCall, list[Filtered]]] = {}  # by thread
        self.trace: GuardTrace | None = None

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "unet calls", f"SafeGuard against {', '.join(map(repr, self._config.concepts))}"

    def pipeline_methods(self) -> Mapping[str, Callable[..., Any]]:
        return {"encode_prompt": self._watch}

    def begin(self, info: RunInfo) -> GuardRun | None:
        found = self._read_by.pop(threading.get_ident(), None)
        self.trace = GuardTrace()
        if found is None:
            info.note("no SafeGuard: this run's prompt has not been through pipe.encode_prompt as text")
            return None
        call, filtered = found
        steps = [min(info.total, 1 + each.last_step(info.total)) for each in filtered]
        self.trace = GuardTrace(tuple(each.tokens for each in filtered), tuple(steps))
        return GuardRun(call, filtered, steps, info)

    def _read(self, pipe: Any, call: PromptCall) -> None:
        if not call.prompts:
            self._read_by.pop(threading.get_ident(), None)
            return
        images = len(call.embeds) // len(call.prompts)
        filtered = [
            filter_prompt(pipe, texts, call.embeds[number * images], self._concepts)
            for number, texts in enumerate(zip(call.prompts, call.second, strict=True))
        ]
        self._read_by[threading.get_ident()] = call, filtered


@dataclass(frozen=True)
class Filtered:
    """One prompt as the guard lets it pass.

    Attributes:
        text: [T, D], with the rows of ``tokens`` changed.
        tokens: the positions of the tokens that speak of the concepts.
        change: b, 0 .. 2.
    """

    text: Tensor
    tokens: tuple[int, ...]
    change: float

    def last_step(self, total: int) -> int:
        """Return the last step of ``total`` that uses the changed text."""
        most = _MOST / (1 + math.exp(-2 * _SHARPNESS * (10 * self.change - _MIDDLE)))
        return round(most * total / _STEPS)


class GuardRun(ExtensionRun):
    """SafeGuard in one run."""

    def __init__(self, call: PromptCall, filtered: Sequence[Filtered], steps: Sequence[int], info: RunInfo) -> None:
        self._call, self._filtered, self._steps, self._info = call, filtered, steps, info
        self._made: tuple[Any, tuple[bool, ...], Tensor] | None = None

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call with the changed rows of the prompts whose steps these still are."""
        guarded = tuple(
            step < last and bool(each.tokens) for last, each in zip(self._steps, self._filtered, strict=True)
        )
        if not any(guarded):
            return call
        text = call.get("encoder_hidden_states")
        if self._made is None or self._made[0] is not text or self._made[1] != guarded:
            first = self._call.find_rows(text)
            if first is None:
                self._info.note("no SafeGuard from here on: the prompt embeddings are not the encoded prompt's")
                self._steps = [0] * len(self._steps)
                return call
            changed, images = text.clone(), len(self._call.embeds) // len(self._filtered)
            for number, (each, now) in enumerate(zip(self._filtered, guarded, strict=True)):
                if now:
                    changed[first + number * images : first + (number + 1) * images] = each.text.to(text)
            self._made = text, guarded, changed
        return {**call, "encoder_hidden_states": self._made[2]}


def filter_prompt(pipe: Any, prompt: tuple[str, str], text: Tensor, concepts: Sequence[Tensor]) -> Filtered:
    """Return a prompt's embedding with the rows changed that speak of the concepts.

    Args:
        pipe: the pipeline.
        prompt: the prompt as text, that of the first and that of the second text encoder.
        text: [T, D], its embedding.
        concepts: per text encoder, an orthonormal basis [D', r] of the concepts (:func:`span`).
    """
    text = text.detach()
    changed, found, words = text.clone(), set(), read_prompt_words(pipe, *prompt)
    widths = [width for _, width in words] if len(words) > 1 else [text.shape[-1]]
    longest = range(0)
    for part, (encoder, tokenizer), basis, (read, _) in zip(
        changed.split(widths, -1), _find_encoders(pipe), concepts, words, strict=True
    ):
        ids, spoken = tokenizer.convert_tokens_to_ids(list(read.pieces)), range(1, len(read.pieces) - 1)
        if not spoken:
            continue
        longest = max(longest, spoken, key=len)
        hidden = torch.stack([pool_text(encoder, ids, hide=position) for position in spoken])
        tokens = [spoken[i] for i in choose_tokens(remove_span(hidden, basis).norm(dim=1))]
        rows = part[tokens].to(torch.float64)
        own = span(hidden)
        part[tokens] = remove_span(rows @ own @ own.T, basis).to(text.dtype)
        found.update(tokens)
    old, new = (each[list(longest)].to(torch.float64) for each in (text, changed))
    change = 1 - float(functional.cosine_similarity(old, new, dim=-1).mean()) if len(longest) else 0.0
    return Filtered(changed, tuple(sorted(found)), change)


def choose_tokens(distances: Tensor) -> list[int]:
    """Return which of n >= 1 tokens speak of the concepts, from the prompt's distances [n] with each of them hidden.

    The only token of a prompt does: there is nothing that speaks for it.
    """
    if len(distances) == 1:
        return [0]
    others = (distances.sum() - distances) / (len(distances) - 1)
    return torch.nonzero(distances >= (1 + _MARGIN) * others).flatten().tolist()


def span(vectors: Tensor) -> Tensor:
    """Return an orthonormal basis Q [D, r] of what vectors [n, D] span; the projector is Q Q^T."""
    left, sizes, _ = torch.linalg.svd(vectors.to(torch.float64).T, full_matrices=False)
    return left[:, sizes > sizes.max() * max(vectors.shape) * torch.finfo(torch.float64).eps]


def remove_span(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return vectors [n, D] without what lies in the span of a basis [D, r]."""
    return vectors - vectors @ basis @ basis.T


def pool_text(encoder: nn.Module, ids: Sequence[int], hide: int | None = None) -> Tensor:
    """Return the pooled embedding [D] of a text in float64: CLIP's last row, after its last norm.

    Args:
        encoder: the text encoder.
        ids: the text's tokens, start and end among them.
        hide: the position of a token that no other one may attend to.
    """
    device = next(encoder.parameters()).device
    seen = torch.ones(1, len(ids), dtype=torch.long, device=device)
    if hide is not None:
        seen[0, hide] = 0
    with torch.no_grad():
        rows = encoder(torch.tensor([list(ids)], device=device), attention_mask=seen).last_hidden_state
    return rows[0, -1].to(torch.float64)


def _read_ids(pipe: Any, tokenizer: Any, text: str) -> list[int]:
    with tokenizer_apart(tokenizer) as own:
        return own(convert_text(pipe, own, text), truncation=True).input_ids


def _find_encoders(pipe: Any) -> list[tuple[nn.Module, Any]]:
    found = []
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        if encoder is not None:
            found.append((encoder, getattr(pipe, name.replace("text_encoder", "tokenizer"))))
    strange = [type(encoder).__name__ for encoder, _ in found if not type(encoder).__name__.startswith("CLIPTextModel")]
    if strange or not found:
        raise ValueError(f"SafeGuard needs CLIP's text encoders, got {', '.join(strange) or 'none'}")
    return found
