"""Semantic binding inside a stock sampling loop: what is optimised between the pipeline's UNet call and the UNet.

Every UNet call of a run goes through :meth:`BindingRun.apply`, which gives it other text rows and other latents.  The
pipeline's own tensors are never written to: what the latents have been moved by is added again in front of
``scheduler.step``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .binding import StepTrace
from .composite import Columns, merge, substitute_end, unmerged
from .freezing import frozen
from .losses import LOSSES, Target, entropy_threshold
from .passes import Passes, rows_of, shifted, without_pooled_text
from .prompts import EncodedPrompts

if TYPE_CHECKING:
    from .binder import Binder

#: Losses in float16 are scaled up before the backward pass, for gradients below its smallest number; powers of two
#: change nothing else.
_LOSS_SCALE = {torch.float16: 2.0**10}


class BindingRun:
    """The binding of one run: the images' embeddings as they are now, and their optimisation.

    Rows are images: row r of the run is row r of the UNet's conditional half.
    """

    def __init__(
        self,
        binder: Binder,
        pipe: Any,
        unet: nn.Module,
        encoded: EncodedPrompts,
        total: int,
        fused: bool,
        note: Callable[[str], None],
    ) -> None:
        self._binder, self._config, self._pipe, self._unet = binder, binder.config, weakref.ref(pipe), unet
        self._encoded, self._total, self._fused, self._note = encoded, total, fused, note
        self._schedule = self._config.schedule(total)
        self._rows = [
            row for row in range(len(encoded.embeds)) if encoded.marked[row // encoded.images_per_prompt].groups
        ]
        self._begin()

    @torch.inference_mode(False)
    def _begin(self) -> None:
        """Embeddings as they are before the first step, in at least float32."""
        embeds = self._encoded.embeds.detach()
        self._text = embeds.to(torch.promote_types(embeds.dtype, torch.float32), copy=True)
        self._columns: dict[int, Columns] = {}
        for row in self._rows:
            marked = self._marked(row)
            if self._config.merge:
                self._text[row], self._columns[row] = merge(
                    self._text[row].clone(), marked.groups, marked.length, self._config.mode, self._config.weights
                )
            else:
                self._columns[row] = unmerged(marked.groups, marked.length)
        self._anchor: _AnchorTrajectory | None = None
        self._previous: dict[int, Tensor] = {}
        self._replaced, self._last, self._given, self._assembled = False, -1, None, None
        trace = self._binder.trace
        trace.things = {row: tuple(group.phrase for group in self._marked(row).groups) for row in self._rows}

    def _marked(self, row: int) -> Any:
        return self._encoded.marked[row // self._encoded.images_per_prompt]

    def apply(
        self, call: Mapping[str, Any], order: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """The arguments with which the UNet is to be called instead of ``call``, after this step's optimisation.

        Args:
            call: the pipeline's arguments by name.
            order: position in the schedule.
            scheduler: the pipeline's.
            stock: the unpatched UNet, called with arguments by name.

        Raises:
            ValueError: a batch that is neither the images nor [unconditional, conditional], or a scheduler that cannot
                step from other latents.
        """
        if order <= self._last:
            self._begin()  # a custom loop starts the same schedule again
        text = call.get("encoder_hidden_states")
        if text is not self._given and not self._is_ours(text):
            self._note("no semantic binding from here on: the prompt embeddings are not the encoded prompt's")
            return call
        self._last = order
        with torch.inference_mode(False):
            moved = self._optimise(call, order, scheduler, stock)
        if self._assembled is None or text is not self._given:
            self._given = text
            self._assembled = torch.cat([text[: len(text) - len(self._text)], self._text.to(text)])
        changed = {**call, "encoder_hidden_states": self._assembled}
        if moved is not None:
            if self._config.mode == "paper":
                self._binder.moved(call["timestep"], moved)
            batch = call["sample"].shape[0]
            changed["sample"] = shifted(
                call["sample"], moved.repeat(batch // len(moved), 1, 1, 1) * _input_scale(scheduler, call["timestep"])
            )
        return changed

    def _is_ours(self, text: Any) -> bool:
        """Whether the call's conditional half is what was encoded."""
        embeds = self._encoded.embeds
        return (
            isinstance(text, Tensor)
            and text.shape[1:] == embeds.shape[1:]
            and text.shape[0] in (len(embeds), 2 * len(embeds))
            and torch.equal(text[-len(embeds) :], embeds.to(text))
        )

    def _optimise(
        self, call: Mapping[str, Any], order: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Tensor | None:
        """Change the embeddings as this step asks for; -> what the images' latents are moved by, or None."""
        schedule, moved = self._schedule, None
        if schedule.replace_step is not None and order >= schedule.replace_step and not self._replaced:
            self._substitute()
        if order >= max(schedule.bind_steps, schedule.focus_steps) or _steps_from_its_own(scheduler):
            return None
        if self._config.mode == "paper" and self._config.optimise != "text" and "last_sample" in vars(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} corrects latents from its own copy of them, so that they cannot be "
                'optimised; use another scheduler, or SemanticBinding(optimise="text")'
            )
        passes = Passes(stock, self._binder.layers, self._fused, self._note)
        with frozen(self._unet), torch.enable_grad():
            if order < schedule.bind_steps:
                self._bind(call, order, scheduler, passes)
            if order < schedule.focus_steps:
                moved = self._focus(call, order, scheduler, passes)
        self._assembled = None
        return moved

    def _substitute(self) -> None:
        for row in self._rows:
            simplified = self._encoded.simplified[row // self._encoded.images_per_prompt]
            self._text[row] = substitute_end(
                self._text[row],
                self._columns[row].length,
                simplified.to(self._text),
                self._marked(row).simplified_length,
                self._config.mode,
            )
        self._replaced, self._assembled = True, None

    # Focus: losses on maps

    def _focus(self, call: Mapping[str, Any], order: int, scheduler: Any, passes: Passes) -> Tensor | None:
        """Move embeddings and latents down the losses on the maps, until every image's are low enough."""
        config, text_dtype = self._config, call["encoder_hidden_states"].dtype
        step_size = config.step_size_at(order, self._total)
        scale = _input_scale(scheduler, call["timestep"])
        channels = self._unet.config.out_channels
        images, batch = len(self._text), call["sample"].shape[0]
        moved = torch.zeros_like(call["sample"][-images:, :channels], dtype=self._text.dtype)
        traces = {row: StepTrace(order, row, "focus") for row in self._rows}
        self._binder.trace.steps += traces.values()
        best: dict[int, tuple[float, Tensor, Tensor]] = {}
        active, seen = list(self._rows), {}
        for _ in range(self._schedule.iterations):
            text = self._text[active].requires_grad_(config.optimise != "latents")
            shift = moved[active].requires_grad_(config.optimise != "text")
            arguments = rows_of(call, [batch - images + row for row in active])
            arguments["sample"] = shifted(arguments["sample"], shift * scale)
            maps, size = passes.maps(arguments, text.to(text_dtype), self._zero_rows(active))
            losses = torch.stack([self._loss(maps[i : i + 1], row, size) for i, row in enumerate(active)])
            going = []
            for i, (row, loss) in enumerate(zip(active, losses.tolist(), strict=True)):
                traces[row].losses.append(loss)
                seen[row] = maps[i : i + 1].detach()
                if not self._good(traces[row]):
                    self._text[row], moved[row] = best[row][1:] if row in best else (self._text[row], moved[row])
                    continue
                if row not in best or loss < best[row][0]:
                    best[row] = loss, self._text[row].clone(), moved[row].clone()
                if self._done(row, order, loss, maps.shape[1]):
                    traces[row].outcome = "done"
                    continue
                going.append(i)
            if not going or not losses.requires_grad:  # constant: nothing to retain at the first step
                break
            loss_scale = _LOSS_SCALE.get(text_dtype, 1.0)
            leaves = [leaf for leaf in (text, shift) if leaf.requires_grad]
            gradients = list(torch.autograd.grad(losses[going].sum() * loss_scale, leaves))
            active = [active[i] for i in going]
            if shift.requires_grad:
                by_shift = gradients.pop() / loss_scale
                moved[active] -= config.latent_share * step_size * by_shift[going]
            if text.requires_grad:
                by_text = gradients.pop() / loss_scale
                for i, row in zip(going, active, strict=True):
                    rows = self._movable(row)
                    self._text[row, rows] -= step_size * by_text[i, rows]
        for row in self._rows:
            if not bool(self._text[row].isfinite().all() & moved[row].isfinite().all()):
                traces[row].outcome = "diverged"
                self._diverged()
                self._text[row], moved[row] = best[row][1:]
        for row, maps in seen.items():
            self._previous[row] = maps
            self._binder.trace.maps[row] = maps[0, :, list(self._columns[row].anchors)].T.unflatten(-1, size)
        return moved if config.optimise != "text" else None

    def _loss(self, maps: Tensor, row: int, size: tuple[int, int]) -> Tensor:
        target = Target(self._columns[row], size, self._previous.get(row), self._config.detach_min)
        return sum(weight * LOSSES[name](maps, target)[0] for name, weight in self._config.losses)

    def _done(self, row: int, order: int, loss: float, pixels: int) -> bool:
        value = self._config.threshold_at(order, self._total)
        if value is None:
            return False
        things = len(self._columns[row].anchors)
        return loss < entropy_threshold(value, things, pixels, shifted=self._config.mode == "paper")

    def _zero_rows(self, active: list[int]) -> tuple[int, ...]:
        """Rows that are zero in the embeddings of all these images and will stay so."""
        config = self._config
        if not (config.mode == "reference" and config.merge and config.optimise == "latents"):
            return ()
        absorbed = {tuple(sorted(i for g in self._marked(row).groups for i in g.absorbed)) for row in active}
        return absorbed.pop() if len(absorbed) == 1 else ()

    def _movable(self, row: int) -> list[int]:
        """Rows of an embedding that the losses on maps may move."""
        if self._config.mode == "reference":
            return list(range(self._text.shape[1]))
        columns = self._columns[row]
        return sorted({*columns.anchors, *(position for rows in columns.attributes for position in rows)})

    def _good(self, trace: StepTrace) -> bool:
        """Whether the latest loss of a step is one to go on from: finite, and not above the first."""
        latest = trace.losses[-1]
        if latest <= trace.losses[0] < float("inf"):  # NaN fails as well
            return True
        trace.outcome = "diverged"
        self._diverged()
        return False

    def _diverged(self) -> None:
        self._note("semantic binding diverged in a step and went back to its best embedding; try smaller step sizes")

    # Bind: a composite token predicts what its phrase predicts

    def _bind(self, call: Mapping[str, Any], order: int, scheduler: Any, passes: Passes) -> None:
        """Move each composite token to where, alone, it predicts what its phrase predicts; all things in one batch."""
        things = [(row, k) for row in self._rows for k in range(len(self._columns[row].anchors))]
        images, batch = len(self._text), call["sample"].shape[0]
        text = call["encoder_hidden_states"]
        base = without_pooled_text(rows_of(call, [batch - images + row for row, _ in things]))
        phrases = torch.cat([self._encoded.phrases[row // self._encoded.images_per_prompt] for row in self._rows])
        if self._config.mode == "reference":
            wanted = self._anchor_prediction(call, base, phrases.to(text), scheduler, passes)
        else:
            with torch.no_grad():
                wanted = passes.prediction(base, phrases.to(text))

        traces = {row: StepTrace(order, row, "bind") for row in self._rows}
        self._binder.trace.steps += traces.values()
        tokens = torch.stack([self._text[row, self._columns[row].anchors[k]] for row, k in things])
        first = best_loss = torch.full((len(things),), float("inf"))
        best, going = tokens.clone(), torch.ones(len(things), dtype=torch.bool)
        loss_scale = _LOSS_SCALE.get(text.dtype, 1.0)
        for iteration in range(self._schedule.bind_iterations):
            leaf = tokens.detach().requires_grad_()
            predicted = passes.prediction(base, leaf[:, None].to(text.dtype))
            errors = (wanted.to(leaf.dtype) - predicted.to(leaf.dtype)).square().flatten(1).mean(1)
            losses = errors.detach().cpu()
            first = losses if not iteration else first
            for row, trace in traces.items():
                trace.losses.append(float(losses[[i for i, thing in enumerate(things) if thing[0] == row]].mean()))
            bad = going & ~((losses <= first) & losses.isfinite())
            better = going & (losses < best_loss)
            best, best_loss = _chosen(better, tokens, best), torch.where(better, losses, best_loss)
            tokens, going = _chosen(bad, best, tokens), going & ~bad
            for i in bad.nonzero().flatten().tolist():
                traces[things[i][0]].outcome = "diverged"
                self._diverged()
            if not going.any():
                break
            (gradient,) = torch.autograd.grad(errors.sum() * loss_scale, leaf)
            tokens = _chosen(going, tokens - self._config.bind_step_size * gradient / loss_scale, tokens)
        broken = ~tokens.isfinite().all(1)
        for i, (row, k) in enumerate(things):
            if bool(broken[i]):
                traces[row].outcome = "diverged"
                self._diverged()
            self._text[row, self._columns[row].anchors[k]] = best[i] if bool(broken[i]) else tokens[i]

    @torch.no_grad()
    def _anchor_prediction(
        self, call: Mapping[str, Any], base: dict[str, Any], phrases: Tensor, scheduler: Any, passes: Passes
    ) -> Tensor:
        """What the phrases predict on latents of their own; sets ``base["sample"]`` and makes those latents' step."""
        images, batch = len(self._text), call["sample"].shape[0]
        if batch != 2 * images:
            raise ValueError('mode="reference" needs classifier-free guidance (guidance_scale above 1)')
        timestep = call["timestep"]
        if self._anchor is None:
            self._anchor = _AnchorTrajectory(base["sample"] / _input_scale(scheduler, timestep), scheduler)
        base["sample"] = self._anchor.scheduler.scale_model_input(self._anchor.latents, timestep)
        wanted = passes.prediction(base, phrases)
        repeats = [row for row in self._rows for _ in self._columns[row].anchors]
        null = rows_of(call, [batch - 2 * images + row for row in repeats])
        null["sample"] = base["sample"]
        nothing = passes.prediction(null, null["encoder_hidden_states"])
        noise = nothing + self._pipe().guidance_scale * (nothing - wanted)
        self._anchor.latents = self._anchor.scheduler.step(noise, timestep, self._anchor.latents).prev_sample
        return wanted


class _AnchorTrajectory:
    """The released code's latents for binding, one for each thing: from the initial noise, guided away from it."""

    def __init__(self, latents: Tensor, scheduler: Any) -> None:
        self.latents, self.scheduler = latents, copy.deepcopy(scheduler)


def _chosen(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of ``a`` where a flag on the CPU is set, else those of ``b``."""
    return torch.where(where.to(a.device)[:, None], a, b)


def _input_scale(scheduler: Any, timestep: Tensor) -> Tensor:
    """What the scheduler multiplies latents by to make the UNet's input."""
    one = torch.ones((), dtype=torch.float64 if timestep.device.type == "cpu" else torch.float32)
    return scheduler.scale_model_input(one.to(timestep.device), timestep)


def _steps_from_its_own(scheduler: Any) -> bool:
    """Whether the coming step is a corrector's, which ignores the latents that it is given."""
    return any(isinstance(vars(scheduler).get(name), Tensor) for name in ("cur_sample", "sample"))
