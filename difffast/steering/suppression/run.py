"""Content suppression in one run: which text each step has, and the optimisation of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...sampling.extension import ExtensionRun, RunInfo
from ...surgery.freezing import freeze
from ..descent import LOSS_SCALES, Leaf, descend, descend_unguarded
from ..passes import Passes, take_rows
from ..prompt_calls import PromptCall
from .config import SuppressionConfig
from .losses import ImageMaps, compute_self_maps, paper_loss, reference_loss
from .source import SourceBranch, SourceSampling
from .trace import Suppressed, SuppressionTrace


class SuppressionRun(ExtensionRun):
    """Content suppression in one run.

    Args:
        config: what to do.
        layers: names of the attn2 layers whose maps are used.
        unet: the pipeline's plain UNet.
        sampling: how it samples.
        prompts: the call of ``encode_prompt``.
        suppressed: what is made of each prompt.
        records: what is told of the run, and where it leaves its record.
    """

    def __init__(
        self,
        config: SuppressionConfig,
        layers: tuple[str, ...],
        unet: nn.Module,
        sampling: SourceSampling,
        prompts: PromptCall,
        suppressed: Sequence[Suppressed],
        records: tuple[RunInfo, SuppressionTrace],
    ) -> None:
        self._config, self._layers, self._unet, self._sampling = config, layers, unet, sampling
        self._prompts, (self._info, self._trace) = prompts, records
        copies = len(prompts.embeds) // len(suppressed)
        #: For each image, what is made of its prompt.
        self._images = [each for each in suppressed for _ in range(copies)]
        self._first, self._end = config.find_window(self._info.total)
        embeds = prompts.embeds.detach()
        texts = [embeds[i] if each.text is None else each.text for i, each in enumerate(self._images)]
        self._regularised = torch.stack(texts)
        self._source: SourceBranch | None = None
        self._made: tuple[Any, Tensor] | None = None
        self._lost = False

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call with the text of its step, after that step's optimisation."""
        given = call.get("encoder_hidden_states")
        if step < self._first or self._lost:
            return call
        if self._made is None or self._made[0] is not given:
            if self._prompts.find_rows(given) is None:
                self._lost = True
                self._info.note("no suppression from here on: the text is not the encoded prompt's")
                return call
            self._made = given, self._assemble(given, self._regularised)
        text = self._made[1]
        if step < self._end and self._config.iterations:
            with torch.inference_mode(False):
                text = self._assemble(given, self._optimise(call, step, scheduler, stock))
        return {**self._replace_pooled(call), "encoder_hidden_states": text}

    def _assemble(self, given: Tensor, texts: Tensor) -> Tensor:
        return torch.cat([given[: len(given) - len(texts)], texts.to(given)])

    def _replace_pooled(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        added = call.get("added_cond_kwargs") or {}
        if "text_embeds" not in added or all(each.pooled is None for each in self._images):
            return call
        pooled, first = added["text_embeds"].clone(), len(added["text_embeds"]) - len(self._images)
        for i, each in enumerate(self._images):
            if each.pooled is not None:
                pooled[first + i] = each.pooled[0].to(pooled)
        return {**call, "added_cond_kwargs": {**added, "text_embeds": pooled}}

    def _optimise(self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]) -> Tensor:
        """Return the texts [images, T, D] of this step, from the regularised ones downhill."""
        config, images, batch = self._config, len(self._images), call["sample"].shape[0]
        passes = Passes(stock, self._layers, self._info.fused, self._info.note)
        source = self._look_at_source(call, step, scheduler, passes)
        texts = self._regularised.to(torch.promote_types(self._regularised.dtype, torch.float32), copy=True)
        rows = [i for i, each in enumerate(self._images) if each.removed]
        text_dtype = call["encoder_hidden_states"].dtype
        shown = self._replace_pooled(call)

        def evaluate(rows: Sequence[int], values: Sequence[Tensor]) -> Tensor:
            arguments = take_rows(shown, [batch - images + row for row in rows])
            with self._watch_self_attention() as itself:
                maps, size = passes.maps(arguments, values[0].to(text_dtype))
            own = torch.stack(itself).mean(0) if itself else None
            return torch.stack(
                [
                    self._loss(source[row], ImageMaps(maps[i], None if own is None else own[i]), row, size)
                    for i, row in enumerate(rows)
                ]
            )

        run = descend_unguarded if config.mode == "reference" else descend
        with freeze(self._unet), torch.enable_grad():
            found = run(
                rows,
                [Leaf(texts, config.step_size_at(step, self._info.total))],
                evaluate,
                iterations=config.iterations,
                loss_scale=LOSS_SCALES.get(text_dtype, 1.0),
            )
        for row, each in found.items():
            self._trace.losses[step, row], self._trace.outcomes[step, row] = each.losses, each.outcome
            if each.outcome == "diverged":
                self._info.note(
                    "suppression diverged in a step and went back to its best text; try a smaller step_size"
                )
        return texts

    def _look_at_source(
        self, call: Mapping[str, Any], step: int, scheduler: Any, passes: Passes
    ) -> Sequence[ImageMaps]:
        """Return, per image, the maps that the step would have without suppression."""
        images = len(self._images)
        if self._source is None:
            self._source = SourceBranch(call, scheduler, images, self._sampling)
        with torch.no_grad(), self._watch_self_attention() as itself:
            last = step == self._end - 1
            maps = self._source.look(call, passes, last=last)
        own = torch.stack(itself).mean(0)[-images:] if itself else None
        return [ImageMaps(maps[i], None if own is None else own[i]) for i in range(images)]

    def _loss(self, source: ImageMaps, own: ImageMaps, row: int, size: tuple[int, int]) -> Tensor:
        image, weight = self._images[row], self._config.weight
        if self._config.mode == "reference":
            return reference_loss(source, own, image.kept, image.removed, weight, size)
        return paper_loss(source, own, image.kept, image.removed, weight)

    @contextlib.contextmanager
    def _watch_self_attention(self) -> Iterator[list[Tensor]]:
        """Collect the self-attention maps [B, N, N] beside the chosen layers, where the loss wants them."""
        found: list[Tensor] = []
        thread = threading.get_ident()

        # PyTorch says in a second step that a hook takes arguments by name; another thread's call may come between.
        def hook(layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> None:
            if threading.get_ident() == thread:
                hidden = arguments[0] if arguments else (named or {})["hidden_states"]
                found.append(compute_self_maps(layer, hidden))

        with contextlib.ExitStack() as stack:
            for name in self._layers if self._config.mode == "reference" else ():
                layer = self._unet.get_submodule(name.removesuffix("attn2") + "attn1")
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield found
