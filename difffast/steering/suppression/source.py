"""The picture as it would be without suppression: a trajectory of its own, beside the pipeline's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..passes import Passes, input_scale, take_rows


class SourceBranch:
    """Latents that go on from a step with the prompt's own text; before it, there is one trajectory only.

    Args:
        call: the UNet call at that step, by name, its text the prompts' own.
        scheduler: the pipeline's, before that step; a copy is kept, with all that it remembers.
        images: how many; their rows are the last of the call.
        channels: of the latents; an inpainting UNet's input has more.
    """

    def __init__(self, call: Mapping[str, Any], scheduler: Any, images: int, channels: int) -> None:
        self._scheduler, self._images, self._channels = copy.deepcopy(scheduler), images, channels
        scale = input_scale(scheduler, call["timestep"])
        self._latents = call["sample"][-images:, :channels] / scale.to(call["sample"].dtype)

    def look(self, call: Mapping[str, Any], passes: Passes, guidance: float, rescale: float, *, last: bool) -> Tensor:
        """Return the source's maps [images, N, T] at a step, and make the step unless it is the last that is wanted.

        One pass gives the maps and the prediction.
        """
        batch = call["sample"].shape[0]
        own = self._scheduler.scale_model_input(self._latents, call["timestep"])
        text = call["encoder_hidden_states"]
        if last:
            rows = take_rows(call, range(batch - self._images, batch))
            rows["sample"] = torch.cat([own, rows["sample"][:, self._channels :]], 1)
            return passes.maps(rows, text[-self._images :])[0]
        sample = torch.cat([own.repeat(batch // self._images, 1, 1, 1), call["sample"][:, self._channels :]], 1)
        noise, maps, _ = passes.prediction_and_maps({**call, "sample": sample}, text)
        if batch > self._images:
            noise = _guide(*noise.chunk(2), guidance, rescale)
        self._latents = self._scheduler.step(noise, call["timestep"], self._latents).prev_sample
        return maps[-self._images :]


def _guide(nothing: Tensor, wanted: Tensor, guidance: float, rescale: float) -> Tensor:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    noise = nothing + guidance * (wanted - nothing)
    return rescale_noise_cfg(noise, wanted, rescale) if rescale else noise
