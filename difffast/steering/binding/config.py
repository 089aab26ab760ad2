"""What semantic binding does and when: configuration and presets.

Source: ToMe, "Token Merging for Training-Free Semantic Binding" (arXiv 2411.07132).  The paper and its released code
differ; both are here as modes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...plan.key_steps import check_int
from ..losses import LOSSES

MODES = ("paper", "reference")
OPTIMISED = ("both", "latents", "text")
#: Denoising steps that the presets' numbers are for.
_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """How often binding does what.

    Attributes:
        bind_steps: steps, from the first, that pull composite tokens to what their phrases predict.
        focus_steps: steps, from the first, that minimise the losses on the maps.
        iterations: most updates in such a step.
        bind_iterations: updates of a composite token in a binding step.
        replace_step: the step from which end tokens are those of the simplified prompt; None: never.
        layout: whether the layout term is added.
    """

    bind_steps: int
    focus_steps: int
    iterations: int
    bind_iterations: int
    replace_step: int | None
    layout: bool


#: Everything a preset stands for, for 50 steps (ToMe's released configurations).
PRESETS: dict[str, Schedule] = {
    "object": Schedule(bind_steps=7, focus_steps=7, iterations=6, bind_iterations=3, replace_step=0, layout=True),
    "attribute": Schedule(
        bind_steps=5, focus_steps=5, iterations=4, bind_iterations=3, replace_step=None, layout=False
    ),
}
#: For each step, the entropy loss of two subjects at which its optimisation ends; the last holds for all later steps.
THRESHOLDS = (26.0, 25.0, 24.0, 23.0, 22.5, 22.0, 21.5, 21.0, 21.0, 21.0)


@dataclass(frozen=True)
class BindingConfig:
    """Bind attributes to the subjects that a prompt marks: composite tokens, replaced end tokens, losses on maps.

    Patch with ``difffast.patch(pipe, binding=SemanticBinding("object"))``, then call
    ``pipe("a [cat wearing sunglasses] and a [dog wearing a hat]")``.  :mod:`difffast.steering.prompts` says how prompts
    are marked.  Images whose prompt marks nothing are left as they are.

    Args:
        preset: a name from ``PRESETS``: "object" for subjects with parts, "attribute" for colours and the like.
        mode: "paper" is the method as published, with thresholds and numbers of steps adapted to maps of any size and
            to any schedule.  "reference" does what the released code does, all of which is listed in
            :mod:`difffast.steering.binding.released`.
        subjects: for a prompt without marks, the pair (nouns, modifiers) of each subject as token positions.
        merge: make composite tokens.  False keeps the embedding, for losses that need the attributes' own maps.
        weights: the weights of the nouns' and of the modifiers' rows in a composite token; None takes the mode's.
        optimise: what the losses on maps change: "latents", "text" or "both".
        losses: the weight of each loss by its name in ``difffast.steering.LOSSES``.  None is {"entropy": 1}, with the
            layout term if the preset has it.
        bind_steps, focus_steps, iterations, bind_iterations: see :class:`Schedule`.  None takes the preset's; in paper
            mode the numbers of steps are scaled from 50.
        replace_step: see :class:`Schedule`; "preset" takes the preset's.
        step_size: the step size of the embedding, which falls linearly to 0 over the schedule.
        latent_share: the step size of the latents, as the UNet sees them, as a share of the embedding's.
        bind_step_size: the step size of a composite token in a binding step.
        thresholds: for each step, the entropy loss at which its optimisation ends (see ``THRESHOLDS``).  They apply if
            there is no other loss but layout.  With () it ends with the iterations.
        layers: the attn2 layers whose maps are used, as names or shell-style patterns; all must have one size.  None
            takes ToMe's for SDXL, and otherwise the deepest level of the encoder that has cross-attention, with its
            counterpart in the decoder.
        detach_min: see :func:`difffast.ops.attention_entropy`.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    preset: str = "object"
    mode: Literal["paper", "reference"] = "paper"
    subjects: Sequence[Sequence[Sequence[int]]] | None = None
    merge: bool = True
    weights: tuple[float, float] | None = None
    optimise: Literal["both", "latents", "text"] = "both"
    losses: Mapping[str, float] | Iterable[tuple[str, float]] | None = None
    bind_steps: int | None = None
    focus_steps: int | None = None
    iterations: int | None = None
    bind_iterations: int | None = None
    replace_step: int | Literal["preset"] | None = "preset"
    step_size: float = 3.0
    latent_share: float = 0.5
    bind_step_size: float = 1e4
    thresholds: Sequence[float] = THRESHOLDS
    layers: str | Sequence[str] | None = None
    detach_min: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("preset", tuple(PRESETS)), ("mode", MODES), ("optimise", OPTIMISED)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("merge", "detach_min"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("bind_steps", "focus_steps", "iterations", "bind_iterations", "replace_step"):
            value = getattr(self, name)
            if value not in (None, "preset") and check_int(name, value) < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name in ("step_size", "latent_share", "bind_step_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if self.weights is not None:
            weights = tuple(self.weights)
            if len(weights) != 2 or not all(type(w) in (int, float) and math.isfinite(w) for w in weights):
                raise ValueError(f"weights must be two finite numbers, got {self.weights!r}")
            object.__setattr__(self, "weights", weights)
        if self.subjects is not None:
            fixed = tuple(
                tuple(tuple(check_int("subjects", p) for p in part) for part in pair) for pair in self.subjects
            )
            if not fixed or any(len(pair) != 2 for pair in fixed):
                raise ValueError(f"subjects must be pairs (nouns, modifiers), at least one, got {self.subjects!r}")
            object.__setattr__(self, "subjects", fixed)
        object.__setattr__(self, "thresholds", tuple(float(value) for value in self.thresholds))
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not self.merge and self.bind_steps != 0:
            raise ValueError("without composite tokens there is nothing to bind: merge=False needs bind_steps=0")
        object.__setattr__(self, "losses", self._check_losses())

    def _check_losses(self) -> tuple[tuple[str, float], ...]:
        if self.losses is None:
            return (("entropy", 1.0), ("layout", 1.0)) if PRESETS[self.preset].layout else (("entropy", 1.0),)
        pairs = tuple(dict(self.losses).items())
        if not pairs:
            raise ValueError("losses must be at least one; focus_steps=0 optimises none")
        for name, weight in pairs:
            if name not in LOSSES:
                raise ValueError(f"unknown loss {name!r}; available: {', '.join(LOSSES)}")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"the weight of loss {name!r} must be a finite number, got {weight!r}")
        if "syngen" in dict(pairs) and self.merge:
            raise ValueError("loss 'syngen' needs the attributes' own maps: merge=False")
        return pairs

    def schedule(self, total: int) -> Schedule:
        """Return what happens in a schedule of ``total`` UNet calls."""
        preset = PRESETS[self.preset]

        def steps(asked: int | None, preset_steps: int) -> int:
            if asked is None and self.mode == "paper":
                asked = -(-preset_steps * total // _STEPS)
            return min(preset_steps if asked is None else asked, total)

        return Schedule(
            bind_steps=steps(self.bind_steps, preset.bind_steps),
            focus_steps=steps(self.focus_steps, preset.focus_steps),
            iterations=preset.iterations if self.iterations is None else self.iterations,
            bind_iterations=preset.bind_iterations if self.bind_iterations is None else self.bind_iterations,
            replace_step=preset.replace_step if self.replace_step == "preset" else self.replace_step,
            layout="layout" in dict(self.losses),
        )

    def full_steps(self, total: int) -> tuple[int, ...]:
        """Return the steps at which embeddings or latents change; the encoder runs there."""
        schedule = self.schedule(total)
        changed = set(range(max(schedule.bind_steps, schedule.focus_steps)))
        if schedule.replace_step is not None and schedule.replace_step < total:
            changed.add(schedule.replace_step)
        return tuple(sorted(changed))

    def step_size_at(self, step: int, total: int) -> float:
        """Return the embedding's step size."""
        return self.step_size * (1 - step / max(total - 1, 1))

    def threshold_at(self, step: int, total: int) -> float | None:
        """Return ToMe's threshold for two subjects; None: never done early."""
        if not self.thresholds or {name for name, _ in self.losses} - {"entropy", "layout"}:
            return None
        position = step if self.mode == "reference" else round(step * _STEPS / total)
        return self.thresholds[min(position, len(self.thresholds) - 1)]
