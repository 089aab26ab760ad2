"""EDICT: two coupled trajectories that can be gone both ways exactly (arXiv 2211.12446).

With x_{t-1} = a x_t + b e as DDIM's move, one step is
    x' = a x + b e(y),    y' = a y + b e(x'),    x'' = p x' + (1 - p) y',    y'' = p y' + (1 - p) x''
and every line can be solved for what it changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...target import Target
from .inversion import Inversion
from .moves import Moves

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...support import Pipeline

#: p, how much each trajectory keeps to itself.
MIXING = 0.93


def invert_edict(pipe: Any, moves: Moves, latents: Tensor, guidance: float) -> Tensor:
    """Return the coupled noises [2, C, h, w] of a picture's latents [1, C, h, w]."""
    x, y = latents, latents
    with pipe.progress_bar(total=len(moves.times)) as bar:
        for step in reversed(range(len(moves.times))):
            y = (y - (1 - MIXING) * x) / MIXING
            x = (x - (1 - MIXING) * y) / MIXING
            y = moves.backwards(y, moves.guide(x, step, guidance), step)
            x = moves.backwards(x, moves.guide(y, step, guidance), step)
            bar.update()
    return torch.cat([x, y])


def follow_edict(pipe: Any, moves: Moves, noises: Tensor, guidance: float) -> Tensor:
    """Return the coupled latents [2, C, h, w] of a picture from their noises."""
    x, y = noises.split(1)
    with pipe.progress_bar(total=len(moves.times)) as bar:
        for step in range(len(moves.times)):
            x = moves.forwards(x, moves.guide(y, step, guidance), step)
            y = moves.forwards(y, moves.guide(x, step, guidance), step)
            x = MIXING * x + (1 - MIXING) * y
            y = MIXING * y + (1 - MIXING) * x
            bar.update()
    return torch.cat([x, y])


def generate_edict(pipe: Pipeline, inversion: Inversion, prompt: str | None = None) -> Image:
    """Return the picture of an inversion by EDICT: the original, or with another prompt an edited one.

    Raises:
        TypeError: a prompt that is no text.
        ValueError: an inversion by another method.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {type(prompt).__name__}")
    if inversion.method != "edict":
        raise ValueError(f"the inversion must be by 'edict', got {inversion.method!r}")
    prompt = inversion.prompt if prompt is None else prompt  # an empty one is a prompt
    moves = Moves(pipe, Target.of(pipe).unet, prompt, inversion.steps, inversion.size)
    with torch.no_grad():
        noises = inversion.trajectory.to(moves.text.device)
        latents = follow_edict(pipe, moves, noises, inversion.guidance)[:1]
        vae = pipe.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]
