"""Running pipelines in tests."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

_BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

#: Denoising steps of tests that run every scheduler: enough for key steps and runs of others between them.
STEPS = 12
#: name -> (class, configuration)
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "PNDM-prk": (PNDMScheduler, {"skip_prk_steps": False}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler-A": (EulerAncestralDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "LCM": (LCMScheduler, {"clip_sample": False}),
    "TCD": (TCDScheduler, {"clip_sample": False}),
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
    "DDPM-clip": (DDPMScheduler, {"clip_sample": True}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DPM++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "DPM++ single": (DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "DEIS": (DEISMultistepScheduler, {}),
    "KDPM2": (KDPM2DiscreteScheduler, {}),
    "SA": (SASolverScheduler, {}),
}


#: With -m slow: other settings of a scheduler that is here anyway, or one that is called as another one is.
_LIKE_OTHERS = {"DDPM-clip", "DPM++ 3M", "DPM++ SDE", "DEIS", "KDPM2", "TCD"}
EVERY_SCHEDULER = [pytest.param(name, marks=[pytest.mark.slow] * (name in _LIKE_OTHERS)) for name in SCHEDULERS]


def scheduler(name: str) -> Any:
    cls, config = SCHEDULERS[name]
    accepted = inspect.signature(cls.__init__).parameters  # the single-step solver knows no steps_offset
    return cls(**{**{name: value for name, value in _BASE.items() if name in accepted}, **config})


def latents(pipe: Any, prompt: Any = "a red circle", *, steps: int = 20, seed: int = 0, **options: Any) -> torch.Tensor:
    """Final latents of a seeded run."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **options).images


def picture(size: int | tuple[int, int] = 32, seed: int = 0) -> Image.Image:
    """A random picture; ``size``: (height, width), or both."""
    height, width = (size, size) if isinstance(size, int) else size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask(size: int | tuple[int, int] = 32) -> Image.Image:
    """The right half of a picture."""
    height, width = (size, size) if isinstance(size, int) else size
    values = np.zeros((height, width), dtype=np.uint8)
    values[:, width // 2 :] = 255
    return Image.fromarray(values)


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference, as a share of the norm of ``right``."""
    return float((found.double() - right.double()).norm() / right.double().norm())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference, as a share of the largest number of ``b``."""
    return largest(a, b) / float(b.abs().max())


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    return float((a - b).abs().nan_to_num(nan=float("inf")).max())
