"""Edits by prompt in one patched pipeline, between its calls."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.cross_attention import find_layers
from ...layers.self_attention import SelfAttention
from ...sampling.extension import Extension, RunInfo
from ...sampling.scheduler_step import Result
from ...surgery.subclass import plain_class
from ...words import Words
from ..inversion.values import ValueTexts
from ..prompt_calls import PromptCall, read_prompt_words, watch_encode_prompt
from .config import EditConfig
from .levels import BLEND_LEVEL, SELF_LEVEL, UNCOND_SELF_LEVEL, find_levels
from .mappers import EditedPrompts, map_refined, map_replaced
from .run import EditRun


class PromptEditor(Extension):
    """Edits by prompt of one pipeline.

    Args:
        config: what to do.
        pipe: the pipeline.
        unet: its plain UNet.
        values: of a picture inverted by "style"; None: the prompts' own.

    Raises:
        ValueError: a word that is not in its prompt, prompts that cannot be mapped, or a local blend where no layer
            has maps for it.
    """

    alone = True
    edits_attention = True

    def __init__(self, config: EditConfig, pipe: Any, unet: nn.Module, values: ValueTexts | None = None) -> None:
        self._values = values
        self.config, self._watch = config, watch_encode_prompt(pipe, self._read)
        self._latents = override_prepare_latents(pipe, self._count_rows)
        source, target = (read_prompt_words(pipe, text)[0][0] for text in (config.source, config.target))
        self._words = source, target
        self._unedited = _check_levels(config, unet)
        self._read_by: dict[int, PromptCall] = {}  # by thread
        self._run_by: dict[int, EditRun] = {}
        self.prepare(max(len(each.pieces) for each in self._words))  # words and prompts are refused here

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "unet calls", f"edit of {self.config.source!r} to {self.config.target!r}"
        for half in self._unedited:
            yield "self-attention", half

    def pipeline_methods(self) -> Mapping[str, Callable[..., Any]]:
        methods = {"encode_prompt": self._watch}
        return methods if self._latents is None else {**methods, "prepare_latents": self._latents}

    def step_results(self) -> Sequence[Result]:
        return () if self.config.blend is None else (self._blend,)

    def full_steps(self, total: int) -> Sequence[int]:
        return range(total if self._values is not None else min(self.config.count_edited_steps(total) + 1, total))

    def begin(self, info: RunInfo) -> EditRun:
        """Begin a run.

        Raises:
            ValueError: it has other prompts than the edit's, or another schedule than the inversion's.
        """
        if self._values is not None:
            self._values.check(info)
        thread = threading.get_ident()
        call = self._read_by.pop(thread, None)
        wanted = (self.config.source, self.config.target)
        if call is None or call.prompts != wanted:
            got = "no prompts as text" if call is None or not call.prompts else list(call.prompts)
            raise ValueError(f"inside an edit the pipeline must be called with its prompts, {list(wanted)}, got {got}")
        prompts = self.prepare(call.embeds.shape[1])
        self._run_by[thread] = EditRun(self.config, prompts, call, info, self._values)
        return self._run_by[thread]

    def prepare(self, rows: int) -> EditedPrompts:
        """Return what the edit makes of its prompts, for embeddings of ``rows`` rows."""
        config, (source, target) = self.config, self._words
        same = len(source.words) == len(target.words)
        if (config.kind or ("replace" if same else "refine")) == "replace":
            mapper = map_replaced(source, target, rows, shift=config.mode == "paper")
        else:
            mapper = map_refined(source, target, rows, shift=config.mode == "paper")
        factors = torch.ones(rows, dtype=torch.float64)
        for word, factor in dict(config.reweight or {}).items():
            factors[list(target.find(word))] = factor
        blend = config.blend and (_mark(source, config.blend[0], rows), _mark(target, config.blend[1], rows))
        return EditedPrompts(mapper, factors, blend)

    def _read(self, pipe: Any, call: PromptCall) -> None:
        self._read_by[threading.get_ident()] = call

    def _count_rows(self) -> int | None:
        """Return how many rows the prompts that were encoded last have; None: there are none."""
        call = self._read_by.get(threading.get_ident())
        return None if call is None else len(call.embeds)

    def _blend(self, _scheduler: Any, _timestep: Any, latents: Tensor) -> Tensor:
        run = self._run_by.get(threading.get_ident())
        return latents if run is None else run.blend(latents)


def _check_levels(config: EditConfig, unet: nn.Module) -> list[str]:
    """Return what of the self-attention an edit asks for and a UNet has no layers for.

    Raises:
        ValueError: the UNet has no layers for the local blend.
    """
    levels = find_levels(unet, find_layers(unet))
    if config.blend is not None and levels is not None and BLEND_LEVEL not in levels:
        raise ValueError(
            f"blend needs cross-attention at level {BLEND_LEVEL} of the UNet, a quarter of the latents' height and "
            f"width, and {type(unet).__name__} has it at {sorted(levels)}"
        )
    levels, found = find_levels(unet, SelfAttention().find(unet)), []
    for name, first in (("self_", SELF_LEVEL), ("uncond_self", UNCOND_SELF_LEVEL)):
        if getattr(config, name) and levels is not None and max(levels, default=0) < first:
            found.append(f"{name} edits nothing: it needs layers at level {first} or deeper, got {sorted(levels)}")
    return found


def _mark(words: Words, word: str, rows: int) -> Tensor:
    marked = torch.zeros(rows, dtype=torch.float64)
    marked[list(words.find(word))] = 1
    return marked


def override_prepare_latents(pipe: Any, count_rows: Callable[[], int | None]) -> Callable[..., Any] | None:
    """Return a ``prepare_latents`` that starts the target from the source's latents; None: the pipeline has none.

    Args:
        pipe: the pipeline.
        count_rows: returns the rows of the prompts' embeddings, or None.

    It raises a ValueError for latents of another number of rows, but one stands for all of them.
    """
    plain = getattr(plain_class(pipe), "prepare_latents", None)
    if plain is None:
        return None

    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        latents = result[0] if isinstance(result, tuple) else result
        rows = count_rows()
        if isinstance(latents, Tensor) and rows is not None and rows % 2 == 0:
            if len(latents) not in (1, rows):
                raise ValueError(f"an edit needs 1 or {rows} rows of latents, got {len(latents)}")
            own = latents.expand(rows // 2, *latents.shape[1:]) if len(latents) == 1 else latents[: rows // 2]
            latents = torch.cat([own, own])
        return (latents, *result[1:]) if isinstance(result, tuple) else latents

    prepare_latents.__signature__ = inspect.signature(plain)
    prepare_latents.__doc__ = plain.__doc__
    return prepare_latents
