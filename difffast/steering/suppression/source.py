"""The picture as it would be without suppression: a trajectory of its own, beside the pipeline's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.cross_attention import find_layers, has_added_keys
from ..guidance import guide
from ..passes import Passes, input_scale, take_rows


@dataclass(frozen=True)
class SourceSampling:
    """How a pipeline samples, for a trajectory beside its own.

    Attributes:
        guidance, rescale: of classifier-free guidance.
        generators: of the scheduler's noise, as the pipeline was given them; None: PyTorch's own.
        channels: of the latents; an inpainting UNet's input has more, and DeepFloyd IF's output a variance as well.
        learned: whether the scheduler takes that variance.
    """

    guidance: float
    rescale: float
    generators: Any
    channels: int
    learned: bool

    @classmethod
    def read(cls, pipe: Any, called: Mapping[str, Any], unet: nn.Module) -> SourceSampling:
        """Return it of a pipeline, the arguments of its call, and its UNet."""
        guidance = called.get("guidance_scale", getattr(pipe, "guidance_scale", 1.0))
        rescale = called.get("guidance_rescale", getattr(pipe, "guidance_rescale", 0.0))
        added = any(map(has_added_keys, find_layers(unet).values()))  # DeepFloyd IF
        channels = unet.config.out_channels // (2 if added else 1)
        learned = added and str(getattr(pipe.scheduler.config, "variance_type", "")).startswith("learned")
        return cls(guidance, rescale, called.get("generator"), channels, learned)

    def guide(self, output: Tensor, images: int) -> Tensor:
        """Return what the scheduler is given of the UNet's output, [images or 2 images, C, H, W]."""
        wanted, variance = output[-images:].tensor_split((self.channels,), 1)
        nothing = output[:-images, : self.channels]
        noise = guide(nothing, wanted, self.guidance, self.rescale) if len(nothing) else wanted
        return torch.cat([noise, variance], 1) if self.learned else noise

    def step(self, scheduler: Any, output: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """Return the latents after a step, with the noise that the pipeline's own step is going to draw."""
        taken = inspect.signature(scheduler.step).parameters
        given = {"generator": _copy_generators(self.generators)} if "generator" in taken else {}
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            return scheduler.step(output, timestep, latents, **given).prev_sample


def _copy_generators(generators: Any) -> Any:
    if isinstance(generators, (list, tuple)):
        return [_copy_generators(each) for each in generators]
    return None if generators is None else generators.clone_state()


class SourceBranch:
    """Latents that go on from a step with the prompt's own text; before it, there is one trajectory only.

    Args:
        call: the UNet call at that step, by name, its text the prompts' own.
        scheduler: the pipeline's, before that step; a copy is kept, with all that it remembers.
        images: how many; their rows are the last of the call.
        sampling: how the pipeline samples.
    """

    def __init__(self, call: Mapping[str, Any], scheduler: Any, images: int, sampling: SourceSampling) -> None:
        self._scheduler, self._images, self._sampling = copy.deepcopy(scheduler), images, sampling
        scale = input_scale(scheduler, call["timestep"])
        self._latents = call["sample"][-images:, : sampling.channels] / scale.to(call["sample"].dtype)

    def look(self, call: Mapping[str, Any], passes: Passes, *, last: bool) -> Tensor:
        """Return the source's maps [images, N, T] at a step, and make the step unless it is the last that is wanted.

        One pass gives the maps and the prediction.
        """
        batch, channels = call["sample"].shape[0], self._sampling.channels
        own = self._scheduler.scale_model_input(self._latents, call["timestep"])
        text = call["encoder_hidden_states"]
        if last:
            rows = take_rows(call, range(batch - self._images, batch))
            rows["sample"] = torch.cat([own, rows["sample"][:, channels:]], 1)
            return passes.maps(rows, text[-self._images :])[0]
        sample = torch.cat([own.repeat(batch // self._images, 1, 1, 1), call["sample"][:, channels:]], 1)
        output, maps, _ = passes.prediction_and_maps({**call, "sample": sample}, text)
        output = self._sampling.guide(output, self._images)
        self._latents = self._sampling.step(self._scheduler, output, call["timestep"], self._latents)
        return maps[-self._images :]
