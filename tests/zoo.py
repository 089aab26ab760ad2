"""Small pipelines of every supported kind with random weights, and one way to run each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sampling import mask, picture
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a run varies.

    Attributes:
        prompt, seed: as they are.
        images: how many at once.
        size: (height, width) in pixels; latents are a quarter of it.
        steps: denoising steps.
        frames: of each video; pictures have none.
    """

    prompt: str = "a red circle"
    seed: int = 0
    images: int = 1
    size: tuple[int, int] = (32, 32)
    steps: int = 10
    frames: int = 2

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Row:
    """One kind of pipeline.

    Attributes:
        build: makes it, in float32 and evaluation mode.
        run: runs it, at least eight steps, and returns the last latents (not decoded).
        other: inputs of a second run, different in everything that may differ.
        warnings: what difffast warns of in every run, as regular expressions; anything else is an error.
        inputs: of the other runs.
    """

    build: Callable[[], Any]
    run: Callable[[Any, Inputs], Tensor]
    other: Inputs = Inputs("two cats", seed=1, images=2, size=(40, 24))
    warnings: tuple[str, ...] = ()
    inputs: Inputs = Inputs()


def text_to_image(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run of most pipelines."""
    height, width = inputs.size
    result = pipe(
        **{
            "prompt": inputs.prompt,
            "num_images_per_prompt": inputs.images,
            "height": height,
            "width": width,
            "num_inference_steps": inputs.steps,
            "generator": inputs.generator,
            "output_type": "latent",
            **options,
        }
    )
    return result[0]


def build_sd(pipeline: str = "StableDiffusionPipeline", in_channels: int = 4, **config: Any) -> Any:
    """A pipeline of Stable Diffusion's parts."""
    import diffusers

    from difffast.models import tiny_pipeline

    pipe = tiny_pipeline("sd", channels=(32, 64), sample_size=8, in_channels=in_channels)
    return getattr(diffusers, pipeline)(**pipe.components, requires_safety_checker=False, **config)


def image_to_image(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from a picture; three quarters of the steps are executed."""
    steps = inputs.steps * 4 // 3
    given = {"image": [picture(inputs.size)] * inputs.images, "strength": 0.75, "num_inference_steps": steps}
    return text_to_image(pipe, inputs, height=None, width=None, **{**given, **options})


def inpainting(pipe: Any, inputs: Inputs) -> Tensor:
    """A run on half of a picture."""
    return text_to_image(pipe, inputs, image=picture(inputs.size), mask_image=mask(inputs.size), strength=1.0)


ROWS: dict[str, Row] = {
    "StableDiffusionPipeline": Row(build_sd, text_to_image),
    "StableDiffusionImg2ImgPipeline": Row(partial(build_sd, "StableDiffusionImg2ImgPipeline"), image_to_image),
    "StableDiffusionInpaintPipeline": Row(partial(build_sd, "StableDiffusionInpaintPipeline", 9), inpainting),
}
