"""Semantic binding inside a stock sampling loop: what is optimised between the pipeline's UNet call and the UNet.

Every UNet call of a run goes through :meth:`BindingRun.edit_call`, which gives it other text rows and other latents.
The pipeline's own tensors are never written to: what the latents have been moved by is added again in front of
``scheduler.step``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...sampling.extension import ExtensionRun, RunInfo
from ...surgery.freezing import freeze
from ..composite import Columns, locate_subjects, merge, substitute_end
from ..descent import LOSS_SCALES, Descended, Leaf, descend, descend_unguarded
from ..encoding import EncodedPrompts
from ..losses import LOSSES, Target, entropy_threshold
from ..passes import Passes, drop_pooled_text, input_scale, shift_latents, take_rows
from .config import BindingConfig
from .released import AnchorTrajectory
from .trace import BindingTrace, StepTrace


class BindingRun(ExtensionRun):
    """The binding of one run: the images' embeddings as they are now, and their optimisation.

    Rows are images: row r of the run is row r of the UNet's conditional half.

    Args:
        config: what to do.
        pipe: a weak reference to the pipeline.
        unet: its plain UNet.
        encoded: the prompts.
        info: of the run.
        layers: names of the layers whose maps are used.
        trace: where everything is recorded.
        move: takes (timestep, what the scheduler's latents are moved by there), in the scheduler's units.
    """

    def __init__(
        self,
        config: BindingConfig,
        pipe: weakref.ref[Any],
        unet: nn.Module,
        encoded: EncodedPrompts,
        info: RunInfo,
        layers: Sequence[str],
        trace: BindingTrace,
        move: Callable[[Tensor, Tensor], None],
    ) -> None:
        self._config, self._pipe, self._unet, self._encoded = config, pipe, unet, encoded
        self._info, self._layers, self._trace, self._move = info, tuple(layers), trace, move
        self._schedule = config.schedule(info.total)
        self._descend = descend if config.mode == "paper" else descend_unguarded
        self._rows = [
            row for row in range(len(encoded.embeds)) if encoded.marked[row // encoded.images_per_prompt].subjects
        ]
        self._begin()

    def _begin(self) -> None:
        """Take the embeddings as they are before the first step, in at least float32."""
        with torch.inference_mode(False):
            embeds = self._encoded.embeds.detach()
            self._text = embeds.to(torch.promote_types(embeds.dtype, torch.float32), copy=True)
            self._columns: dict[int, Columns] = {}
            for row in self._rows:
                marked, config = self._find_marked(row), self._config
                if config.merge:
                    self._text[row], self._columns[row] = merge(
                        self._text[row].clone(), marked.subjects, marked.length, config.mode, config.weights
                    )
                else:
                    self._columns[row] = locate_subjects(marked.subjects, marked.length)
        self._anchor: AnchorTrajectory | None = None
        self._previous: dict[int, Tensor] = {}
        self._replaced, self._last, self._given, self._assembled = False, -1, None, None
        self._trace.subjects = {
            row: tuple(subject.phrase for subject in self._find_marked(row).subjects) for row in self._rows
        }

    def _find_marked(self, row: int) -> Any:
        return self._encoded.marked[row // self._encoded.images_per_prompt]

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the arguments of the UNet call after this step's optimisation.

        Args:
            call: the pipeline's arguments by name.
            step: the position in the schedule.
            scheduler: the pipeline's.
            stock: the unpatched UNet, called with arguments by name.

        Raises:
            ValueError: a batch that is neither the images nor [unconditional, conditional], or a scheduler that cannot
                step from other latents.
        """
        if step <= self._last:
            self._begin()  # a custom loop starts the same schedule again
        text = call.get("encoder_hidden_states")
        if text is not self._given and not self._is_ours(text):
            self._info.note("no semantic binding from here on: the prompt embeddings are not the encoded prompt's")
            return call
        self._last = step
        with torch.inference_mode(False):
            moved = self._optimise(call, step, scheduler, stock)
        if self._assembled is None or text is not self._given:
            self._given = text
            self._assembled = torch.cat([text[: len(text) - len(self._text)], self._text.to(text)])
        changed = {**call, "encoder_hidden_states": self._assembled}
        if moved is not None:
            if self._config.mode == "paper":
                self._move(call["timestep"], moved / input_scale(scheduler, call["timestep"]))
            batch = call["sample"].shape[0]
            changed["sample"] = shift_latents(call["sample"], moved.repeat(batch // len(moved), 1, 1, 1))
        return changed

    def _is_ours(self, text: Any) -> bool:
        """Return whether the call's conditional half is what was encoded."""
        embeds = self._encoded.embeds
        return (
            isinstance(text, Tensor)
            and text.shape[1:] == embeds.shape[1:]
            and text.shape[0] in (len(embeds), 2 * len(embeds))
            and torch.equal(text[-len(embeds) :], embeds.to(text))
        )

    def _optimise(self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]) -> Tensor | None:
        """Change the embeddings as this step asks for; returns what the UNet's input is moved by, or None."""
        schedule, moved = self._schedule, None
        if schedule.replace_step is not None and step >= schedule.replace_step and not self._replaced:
            self._substitute()
        if step >= max(schedule.bind_steps, schedule.focus_steps):
            return None
        if self._config.mode == "paper" and _steps_from_its_own(scheduler):
            return None
        if self._config.mode == "paper" and self._config.optimise != "text" and "last_sample" in vars(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} corrects latents from its own copy of them, so that they cannot be "
                'optimised; use another scheduler, or SemanticBinding(optimise="text")'
            )
        passes = Passes(stock, self._layers, self._info.fused, self._info.note)
        with freeze(self._unet), torch.enable_grad():
            if step < schedule.bind_steps:
                self._bind(call, step, scheduler, passes)
            if step < schedule.focus_steps:
                moved = self._focus(call, step, passes)
        self._assembled = None
        return moved

    def _substitute(self) -> None:
        for row in self._rows:
            simplified = self._encoded.simplified[row // self._encoded.images_per_prompt]
            self._text[row] = substitute_end(
                self._text[row],
                self._columns[row].length,
                simplified.to(self._text),
                self._find_marked(row).simplified_length,
                self._config.mode,
            )
        self._replaced, self._assembled = True, None

    def _focus(self, call: Mapping[str, Any], step: int, passes: Passes) -> Tensor | None:
        """Move embeddings and latents down the losses on the maps; returns what the UNet's input is moved by.

        Step sizes are for the UNet's input, whatever the scheduler multiplies its latents by to make it.
        """
        config, text_dtype = self._config, call["encoder_hidden_states"].dtype
        step_size = config.step_size_at(step, self._info.total)
        if config.merge or config.mode == "reference":
            call = drop_pooled_text(call)
        images, batch = len(self._text), call["sample"].shape[0]
        moved = torch.zeros_like(call["sample"][-images:, : self._unet.config.out_channels], dtype=self._text.dtype)
        seen: dict[int, tuple[Tensor, tuple[int, int]]] = {}

        def evaluate(rows: Sequence[int], values: Sequence[Tensor]) -> Tensor:
            text, shift = values
            arguments = take_rows(call, [batch - images + row for row in rows])
            arguments["sample"] = shift_latents(arguments["sample"], shift)
            maps, size = passes.maps(arguments, text.to(text_dtype), self._zero_rows(rows))
            if torch.is_grad_enabled():  # the guard's last look may be at what is put back
                seen.update((row, (maps[i : i + 1].detach(), size)) for i, row in enumerate(rows))
            return torch.stack([self._loss(maps[i : i + 1], row, size) for i, row in enumerate(rows)])

        found = self._descend(
            self._rows,
            [
                Leaf(self._text, None if config.optimise == "latents" else step_size, self._movable),
                Leaf(moved, None if config.optimise == "text" else config.latent_share * step_size),
            ],
            evaluate,
            iterations=self._schedule.iterations,
            is_done=lambda row, loss: self._is_done(row, step, loss, seen[row][0].shape[1]),
            loss_scale=LOSS_SCALES.get(text_dtype, 1.0),
        )
        self._record(step, "focus", {row: [each] for row, each in found.items()})
        for row, (maps, size) in seen.items():
            if not bool(maps.isfinite().all()):
                continue  # what has been put back leaves nothing for the losses of later steps
            self._previous[row] = maps
            self._trace.maps[row] = maps[0, :, list(self._columns[row].anchors)].T.unflatten(-1, size)
        return None if config.optimise == "text" else moved

    def _loss(self, maps: Tensor, row: int, size: tuple[int, int]) -> Tensor:
        reference = self._config.mode == "reference"
        target = Target(self._columns[row], size, self._previous.get(row), reference, self._config.detach_min)
        return sum(weight * LOSSES[name](maps, target)[0] for name, weight in self._config.losses)

    def _is_done(self, row: int, step: int, loss: float, pixels: int) -> bool:
        value = self._config.threshold_at(step, self._info.total)
        if value is None:
            return False
        subjects = len(self._columns[row].anchors)
        return loss < entropy_threshold(value, subjects, pixels, shifted=self._config.mode == "paper")

    def _zero_rows(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return the text rows that are zero in the embeddings of all these images and will stay so."""
        config = self._config
        if not (config.mode == "reference" and config.merge and config.optimise == "latents"):
            return ()
        absorbed = {tuple(sorted(i for s in self._find_marked(row).subjects for i in s.absorbed)) for row in rows}
        return absorbed.pop() if len(absorbed) == 1 else ()

    def _movable(self, row: int) -> list[int]:
        """Return the rows of an embedding that the losses on maps may move."""
        if self._config.mode == "reference":
            return list(range(self._text.shape[1]))
        columns = self._columns[row]
        return sorted({*columns.anchors, *(position for rows in columns.attributes for position in rows)})

    def _record(self, step: int, kind: str, found: Mapping[int, Sequence[Descended]]) -> None:
        """Record an optimisation: per image, the mean over its descents of each iteration's loss."""
        for row, each in found.items():
            length = max(len(one.losses) for one in each)
            losses = [
                sum(one.losses[i] if i < len(one.losses) else one.best for one in each) / len(each)
                for i in range(length)
            ]
            outcome = next((one.outcome for one in each if one.outcome == "diverged"), each[0].outcome)
            self._trace.steps.append(StepTrace(step, row, kind, losses, outcome))
            if outcome == "diverged":
                self._info.note(
                    "semantic binding diverged in a step and went back to its best embedding; try smaller step sizes"
                )

    def _bind(self, call: Mapping[str, Any], step: int, scheduler: Any, passes: Passes) -> None:
        """Move each composite token to where, alone, it predicts what its phrase predicts; all of them in one batch."""
        places = [(row, k) for row in self._rows for k in range(len(self._columns[row].anchors))]
        images, batch = len(self._text), call["sample"].shape[0]
        text = call["encoder_hidden_states"]
        base = drop_pooled_text(take_rows(call, [batch - images + row for row, _ in places]))
        phrases = torch.cat([self._encoded.phrases[row // self._encoded.images_per_prompt] for row in self._rows])
        with torch.no_grad():
            if self._config.mode == "reference":
                wanted = self._predict_on_anchor(call, base, phrases.to(text), scheduler, passes)
            else:
                wanted = passes.prediction(base, phrases.to(text))
        tokens = torch.stack([self._text[row, self._columns[row].anchors[k]] for row, k in places])

        def evaluate(rows: Sequence[int], values: Sequence[Tensor]) -> Tensor:
            (token,) = values
            predicted = passes.prediction(take_rows(base, rows), token[:, None].to(text.dtype))
            errors = wanted[list(rows)].to(token.dtype) - predicted.to(token.dtype)
            return errors.square().flatten(1).mean(1)

        found = self._descend(
            range(len(places)),
            [Leaf(tokens, self._config.bind_step_size)],
            evaluate,
            iterations=self._schedule.bind_iterations,
            loss_scale=LOSS_SCALES.get(text.dtype, 1.0),
        )
        by_row = {row: [found[i] for i, (each, _) in enumerate(places) if each == row] for row in self._rows}
        self._record(step, "bind", by_row)
        for token, (row, k) in zip(tokens, places, strict=True):
            self._text[row, self._columns[row].anchors[k]] = token

    def _predict_on_anchor(
        self, call: Mapping[str, Any], base: dict[str, Any], phrases: Tensor, scheduler: Any, passes: Passes
    ) -> Tensor:
        """Return what the phrases predict on latents of their own; sets ``base["sample"]`` and makes their step."""
        images, batch = len(self._text), call["sample"].shape[0]
        if batch != 2 * images:
            raise ValueError('mode="reference" needs classifier-free guidance (guidance_scale above 1)')
        timestep, sample, channels = call["timestep"], base["sample"], self._unet.config.out_channels
        if self._anchor is None:
            self._anchor = AnchorTrajectory(sample[:, :channels] / input_scale(scheduler, timestep), scheduler)
        base["sample"] = torch.cat([self._anchor.scale(timestep), sample[:, channels:]], 1)
        wanted = passes.prediction(base, phrases)
        null = [batch - 2 * images + row for row in self._rows for _ in self._columns[row].anchors]
        nothing = passes.prediction(base, call["encoder_hidden_states"][null])
        pipe = self._pipe()
        rescale = getattr(pipe, "guidance_rescale", 0.0)
        self._anchor.step(wanted, nothing, timestep, pipe.guidance_scale, rescale)
        return wanted


def _steps_from_its_own(scheduler: Any) -> bool:
    """Return whether the coming step is a corrector's, which ignores the latents that it is given."""
    state = vars(scheduler)
    if "order_list" in state:  # the single-step solver, which keeps its latents after the last step that needs them
        return scheduler.step_index is not None and scheduler.order_list[scheduler.step_index] > 1
    return any(isinstance(state.get(name), Tensor) for name in ("cur_sample", "sample"))
