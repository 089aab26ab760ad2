"""InfEdit's way without inversion: the denoising diffusion consistent model, DDCM (arXiv 2312.04965).

A picture z_0 is noised at every step with noise of its own, z = sqrt(a) z_0 + sqrt(1 - a) e', so that the noise is
known, and nothing has to be inverted.  Of an edit with latents y, the picture is
    y_0 = (y - sqrt(1 - a) (e(y, target) - e(z, source) + e')) / sqrt(a)
and both go to the next level, b, with the same new noise e'':
    z <- sqrt(b) z_0 + sqrt(1 - b) e'',    y <- sqrt(b) y_0 + sqrt(1 - b) e''
With velocities v this is y_0 = z_0 + x_0(y, target) - x_0(z, source), x_0(x) = sqrt(a) x - sqrt(1 - a) v(x), which
holds where a = 0 as well.  The source comes out as it went in, exactly.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sampling.extension import Extension, ExtensionRun, RunInfo
from ...sampling.scheduler_step import Result
from ..guidance import guide
from ..prompt_calls import count_images
from .moves import read_level
from .values import check_steps


class VirtualReplay(Extension):
    """A picture that is noised instead of inverted, in one pipeline.

    Args:
        picture: z_0 [1, C, h, w].
        steps: denoising steps.
        pipe: the pipeline; only a weak reference is kept.
    """

    alone = True

    def __init__(self, picture: Tensor, steps: int, pipe: Any) -> None:
        self._picture, self._steps, self._pipe = picture, steps, weakref.ref(pipe)
        self._calls: dict[int, tuple[Any, int]] = {}  # by thread: the generator, and images of each prompt
        self._run_by: dict[int, VirtualRun] = {}

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "scheduler.step", "a picture noised anew at every step (DDCM)"

    def see_call(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._calls[threading.get_ident()] = kwargs.get("generator"), count_images(pipe, args, kwargs)

    def full_steps(self, total: int) -> Sequence[int]:
        return range(total)

    def step_results(self) -> Sequence[Result]:
        return (self._replace,)

    def begin(self, info: RunInfo) -> VirtualRun:
        """Begin a run.

        Raises:
            ValueError: its schedule is not the inversion's.
        """
        check_steps(self._steps, info)
        thread = threading.get_ident()
        found, images = self._calls.pop(thread, (None, 1))
        generator = found[0] if isinstance(found, (list, tuple)) else found
        run = self._run_by[thread] = VirtualRun(self._picture, generator, self._pipe(), images)
        return run

    def _replace(self, scheduler: Any, _timestep: Any, latents: Tensor) -> Tensor:
        run = self._run_by.get(threading.get_ident())
        return latents if run is None else run.advance(scheduler, latents)


class VirtualRun(ExtensionRun):
    """A picture that is noised instead of inverted, in one run.

    Of an even number of prompts, the first half are the picture's and the other half are edits of them; one is the
    picture's.

    Args:
        picture: z_0 [1, C, h, w].
        generator: of the noise.
        pipe: the pipeline, which knows its guidance.
        images: of each prompt.
    """

    def __init__(self, picture: Tensor, generator: Any, pipe: Any, images: int = 1) -> None:
        self._picture, self._generator, self._pipe, self._images = picture, generator, pipe, images
        self._step = 0
        self._sample: Tensor | None = None
        self._output: Tensor | None = None

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call; at the first step, the pipeline's noise is that of the picture."""
        self._step, sample = step, call["sample"]
        if step == 0:
            root, rest = read_level(scheduler.alphas_cumprod[int(scheduler.timesteps[0])])
            call = {**call, "sample": root * self._picture.to(sample) + rest * sample}
        self._sample = call["sample"]
        return call

    def see_output(self, step: int, output: Tensor) -> None:
        self._output = output

    def advance(self, scheduler: Any, latents: Tensor) -> Tensor:
        """Return the latents of the next step, in place of those that the scheduler has made."""
        from diffusers.utils.torch_utils import randn_tensor

        sample, output, count = self._sample[-len(latents) :], self._output, len(latents)
        if len(output) > count:
            rescale = getattr(self._pipe, "guidance_rescale", 0.0)  # not every pipeline has it
            output = guide(*output.chunk(2), self._pipe.guidance_scale, rescale)
        levels, times = scheduler.alphas_cumprod, scheduler.timesteps
        root, rest = read_level(levels[int(times[self._step])])
        last = self._step + 1 == len(times)
        next_root, next_rest = (1.0, 0.0) if last else read_level(levels[int(times[self._step + 1])])
        precise = torch.promote_types(latents.dtype, torch.float32)
        sample, output, picture = (x.to(latents.device, precise) for x in (sample, output, self._picture))
        sources = count // 2 if count // self._images % 2 == 0 else count
        shape = (sources, *latents.shape[1:])
        noise = randn_tensor(shape, generator=self._generator, device=latents.device, dtype=precise)
        following = next_root * picture + next_rest * noise
        if sources < count:
            if scheduler.config.prediction_type == "v_prediction":
                before, edited = (root * sample - rest * output).chunk(2)
            else:
                before, edited = ((sample - rest * output) / root).chunk(2)
            following = torch.cat([following, following + next_root * (edited - before)])
        return following.to(latents.dtype)
