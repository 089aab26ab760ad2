"""Prior noise injection: z <- z + alpha * e before a scheduler step, in the second half of the schedule.

Propagated features lose some high-frequency texture; a little of the initial noise e brings it back.  The second half
is that of the training time, t < 500 of 1000.  Schedules in other units than training steps (EDM's are log sigma) have
no such middle: there it is the second half of the steps.
Source: Faster Diffusion (arXiv 2312.09608), section 3.3, alpha = 0.003.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..surgery.subclass import plain_class
from .extension import Extension
from .position import find_step, is_element
from .scheduler_step import Edit

#: Largest timestep of schedules in other units than training steps.
_FEW = 10


class PriorNoise(Extension):
    """The initial noise of a pipeline's current run, and its injection into ``scheduler.step``.

    Args:
        alpha: strength; 0.003 in the paper.
    """

    alone = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._timesteps: TensorWeakRef | None = None
        self._noise: Tensor | None = None
        self._late: Tensor | None = None  # whether a step is in the second half
        self._last = -1

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "scheduler.step", f"prior noise injection, alpha = {self.alpha}"

    def latent_edits(self) -> Sequence[Edit]:
        return (self.inject,)

    def scheduler_methods(self, scheduler: Any) -> Mapping[str, Callable[..., Any]]:
        plain = plain_class(scheduler)
        owner = self
        if not hasattr(plain, "add_noise"):
            return {}

        def add_noise(self: Any, original_samples: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            owner.remember(self, noise)
            return plain.add_noise(self, original_samples, noise, *args, **kwargs)

        return {"add_noise": add_noise}

    def remember(self, scheduler: Any, noise: Tensor) -> None:
        """Keep the pure noise of an image-to-image run: there, the first latents are not noise alone."""
        self._follow(scheduler)
        if self._noise is None:
            self._noise = noise

    def inject(self, scheduler: Any, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """Return the latents to step from: ``sample`` [B, C, H, W] plus the scaled noise in the second half.

        Nothing is read from the device: the half is a mask computed where the timestep lives.
        """
        self._follow(scheduler)
        timesteps = scheduler.timesteps
        if not is_element(timestep, timesteps):
            warnings.warn(
                "difffast: no prior noise: the timestep is not an element of scheduler.timesteps", stacklevel=3
            )
            return sample
        step = find_step(timestep, timesteps)
        initial = float(scheduler.init_noise_sigma)
        if step <= self._last:
            self._noise = None  # a custom loop starts the same schedule again
        self._last = step
        if self._noise is None:
            if step > 0:
                warnings.warn("difffast: no prior noise: this run's initial noise was not seen", stacklevel=3)
                return sample
            self._noise = sample / initial
        if self._noise.shape != sample.shape:
            warnings.warn(
                f"difffast: no prior noise: latents of shape {tuple(sample.shape)}, "
                f"initial noise of shape {tuple(self._noise.shape)}",
                stacklevel=3,
            )
            return sample
        # Schedulers that start from unit noise keep latents at unit variance; the others work on x0 + sigma * e, where
        # the UNet sees them over the root of sigma^2 and the data's variance.
        data = scheduler.config.get("sigma_data") or 1.0
        scale = 1.0 if initial == 1.0 else (data**2 + float(scheduler.sigmas[step]) ** 2) ** 0.5
        if self._late is None:
            self._late = _find_late_steps(scheduler)
        return sample + self._late[step].to(sample) * (self.alpha * scale) * self._noise.to(sample)

    def _follow(self, scheduler: Any) -> None:
        """Forget the last run's noise when the scheduler has a new schedule."""
        if self._timesteps is None or self._timesteps() is not scheduler.timesteps:
            self._timesteps = TensorWeakRef(scheduler.timesteps)
            self._noise, self._late, self._last = None, None, -1


def _find_late_steps(scheduler: Any) -> Tensor:
    """Return which steps are in the second half of a schedule: bool [steps], where the timesteps are."""
    times, trained = scheduler.timesteps, scheduler.config.get("num_train_timesteps")
    by_step = torch.arange(len(times), device=times.device) >= len(times) / 2
    if trained is None:
        return by_step
    # Logarithms become negative, or are a few units at most, as shares and angles are; training steps begin higher.
    return torch.where((times.amin() >= 0) & (times.amax() > _FEW), times < trained / 2, by_step)
