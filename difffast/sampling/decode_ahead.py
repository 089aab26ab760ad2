"""Encoder propagation: at a key step the encoder runs, and the steps up to the next one are decoded from its features.

Source: Faster Diffusion (arXiv 2312.09608), section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..plan import EncoderPropagation
from ..unet import split
from ..unet.features import Features
from .state import RunState, Step
from .strategy import Strategy, weigh


class DecodeAhead(Strategy):
    """Decode segments of steps from the features of their key step, and queue what is made ahead.

    Args:
        state: the run's plan and counts.
        config: what was asked for.
    """

    def __init__(self, state: RunState, config: EncoderPropagation) -> None:
        super().__init__(state)
        self._degree = config.extrapolate
        self._share = config.share_skips and not config.extrapolate
        self._features: Features | None = None
        self._queue: dict[int, tuple[bool, Tensor]] = {}
        self._known: list[tuple[int, Features]] = []  # of key steps, latest first, to extrapolate over

    def recall(self, index: int) -> tuple[bool, Tensor] | None:
        if index not in self._queue:
            return None
        self._state.stats.propagated += 1
        return self._queue.pop(index)

    def predict(self, step: Step) -> Tensor:
        plan, stats = self._state.plan, self._state.stats
        if self._features is None or plan.is_key(step.index):
            self._features = None
            self._state.count_key(step.index)
            if not plan.builds_on(step.index):
                return step.run_whole()
            self._features = self._encode(step)
            self._remember(step.index)
            stats.unshared.update(self._features.unshared)
        else:
            stats.propagated += 1
        output, *others = self._decode(step)
        self._queue.update((step.index + 1 + i, (step.half, other)) for i, other in enumerate(others))
        return output

    def forget(self) -> None:
        self._features = None
        self._queue.clear()
        self._known.clear()
        if self._state.division is not None:
            self._state.division.forget()

    def _encode(self, step: Step) -> Features:
        encode = functools.partial(split.encode, step.unet, step.call, share=self._share, execute=step.execute)
        return encode() if self._state.division is None else self._state.division.encode(encode, step.rows)

    def _remember(self, index: int) -> None:
        """Keep the features, and those of as many key steps before as the degree asks for."""
        if self._degree:
            batch = self._features.batch
            earlier = [each for each in self._known[: self._degree] if each[1].batch >= batch]  # half cannot be both
            self._known = [(index, self._features), *earlier]

    def _decode(self, step: Step) -> Sequence[Tensor]:
        """Return the UNet's outputs for this step, and for those of the plan's batch that follow it."""
        state, outputs = self._state, None
        known = self._known or [(step.index, self._features)]
        features, *earlier = (each if each.batch == step.rows else each.take_conditional() for _, each in known)
        while outputs is None:
            together, mine = self._choose_steps(step.index)
            # On the latents' device, as some loops keep the schedule on another, and of the type that the call has.
            times = state.timesteps()[mine.start : mine.stop].to(
                step.call["sample"].device, step.call["timestep"].dtype, non_blocking=True
            )
            try:
                weights = None
                if earlier:
                    at = [index for index, _ in known]
                    weights = torch.stack([weigh(at, each, times.device) for each in mine])
                outputs = split.decode(
                    step.unet, features, step.call, times, earlier=earlier, weights=weights, execute=step.execute
                )
            except torch.OutOfMemoryError:
                if len(together) == 1 or state.division is not None:
                    raise  # other processes would decode other steps
                state.plan = replace(state.plan, max_batch=len(together) // 2)
                size = state.plan.max_batch
                state.note(f"out of memory decoding {len(together)} steps at once: {size} from now on")
        state.stats.decode_batches.append(len(mine))
        if not state.plan.builds_on(together.stop - 1):
            self._features = None  # the whole segment is decoded
        return outputs if state.division is None else state.division.join_steps(outputs, together)

    def _choose_steps(self, index: int) -> tuple[range, range]:
        """Return the steps that are decoded together from a step on, and those of them that this process decodes."""
        state = self._state
        plan = state.plan if state.division is None else state.division.widen(state.plan)
        together = plan.batch(index)[: 1 if state.alone else None]
        return together, together if state.division is None else state.division.take_steps(together)
