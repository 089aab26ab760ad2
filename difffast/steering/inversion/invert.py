"""invert: find the noise, and what else it takes, from which a pipeline makes a given picture.

Sources: DDIM (arXiv 2010.02502); null-text inversion (2211.09794); negative-prompt inversion, NPI (2305.16807); direct
inversion (2310.01506); EDICT (2211.12446).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...plan.key_steps import check_int
from ...surgery.freezing import freeze
from ...target import Target
from .edict import invert_edict
from .inversion import METHODS, Inversion
from .moves import Moves

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...support import Pipeline

#: Most updates of the null text in a step, its first rate, and the error at which a step ends early.
_UPDATES, _RATE, _ENOUGH = 10, 1e-2, 1e-5


def invert(
    pipe: Pipeline,
    image: Image,
    prompt: str,
    method: str = "direct",
    *,
    steps: int = 50,
    guidance: float = 7.5,
    checkpoint: str | Path | None = None,
) -> Inversion:
    """Find the noise, and what else it takes, from which a pipeline makes a picture.

    Args:
        pipe: a pipeline of Stable Diffusion's kind, with a DDIMScheduler.
        image: the picture, its sides multiples of the autoencoder's factor.
        prompt: what it shows.
        method: "ddim" keeps the noise alone; "direct" also the way, which the source's latents are put back to at every
            step, so that it comes out exactly; "npi" has the prompt in place of the empty one; "null" optimises a text
            in place of the empty one, at every step; "edict" couples two noises, which is exact without a memory.
        steps: denoising steps.
        guidance: the guidance scale of the reconstruction.
        checkpoint: a file to which "null" writes after every step, and from which it goes on if it is there.

    Returns:
        The inversion, with ``save`` and ``load``.

    Raises:
        TypeError, ValueError: unknown method, a picture of a wrong size, another scheduler, or a checkpoint of another
            inversion.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if check_int("steps", steps) < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 1 <= guidance < math.inf:
        raise ValueError(f"guidance must be finite and at least 1, got {guidance}")
    target = Target.of(pipe)
    size = (image.height, image.width)
    with torch.no_grad():
        start = encode_image(pipe, image)
        moves = Moves(pipe, target.unet, prompt, steps, size)
        if method == "edict":
            return Inversion(method, prompt, guidance, size, invert_edict(pipe, moves, start, guidance), steps)
        trajectory = _go_back(pipe, moves, start)
    found = Inversion(method, prompt, guidance, size, trajectory, steps)
    if method != "null":
        return found
    with freeze(target.unet):
        return _optimise_null(pipe, moves, found, None if checkpoint is None else Path(checkpoint))


def encode_image(pipe: Any, image: Image) -> Tensor:
    """Return the latents [1, C, h, w] of a picture, the mean of what the autoencoder says.

    Raises:
        ValueError: a side that is no multiple of the autoencoder's factor.
    """
    factor = pipe.vae_scale_factor
    if image.width % factor or image.height % factor:
        raise ValueError(f"the picture's sides must be multiples of {factor}, got {image.width} x {image.height}")
    pixels = pipe.image_processor.preprocess(image.convert("RGB"), image.height, image.width)
    vae = pipe.vae
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    if not bool(mean.isfinite().all()):
        raise ValueError(f"the autoencoder's latents are not finite in {vae.dtype}: use one in float32")
    return (mean - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def _go_back(pipe: Any, moves: Moves, latents: Tensor) -> Tensor:
    """Return the latents [steps + 1, C, h, w] before each step, found from the picture backwards without guidance."""
    way = [latents]
    with pipe.progress_bar(total=len(moves.times)) as bar:
        for step in reversed(range(len(moves.times))):
            way.append(moves.backwards(way[-1], moves.predict_text(way[-1], step), step))
            bar.update()
    return torch.cat(way[::-1])


def _optimise_null(pipe: Any, moves: Moves, found: Inversion, checkpoint: Path | None) -> Inversion:
    """Return the inversion with a null text for every step, from the last one that a checkpoint has."""
    done: list[Tensor] = []
    losses: list[float] = []
    if checkpoint is not None and checkpoint.is_file():
        earlier = Inversion.load(checkpoint)
        _check_same(found, earlier, checkpoint)
        done, losses = list(earlier.null.to(moves.null)), list(earlier.losses)
    latents = found.trajectory[:1]
    with pipe.progress_bar(total=found.steps) as bar:
        for step in range(found.steps):
            if step >= len(done):
                before = done[-1] if done else moves.null[0]
                wanted = found.trajectory[step + 1]
                null, loss = optimise_null_text(moves, latents, wanted, before, step, found.guidance)
                done.append(null)
                losses.append(loss)
                if checkpoint is not None:
                    dataclasses.replace(found, null=torch.stack(done), losses=tuple(losses)).save(checkpoint)
            with torch.no_grad():
                noise = moves.guide(latents, step, found.guidance, done[step][None])
                latents = moves.forwards(latents, noise, step)
            bar.update()
    return dataclasses.replace(found, null=torch.stack(done), losses=tuple(losses))


def optimise_null_text(
    moves: Moves, latents: Tensor, wanted: Tensor, null: Tensor, step: int, guidance: float
) -> tuple[Tensor, float]:
    """Return the text [T, D] with which a guided step comes nearest to where it should, and its mean square error.

    Args:
        moves: of the pipeline.
        latents: [1, C, h, w], before the step.
        wanted: [C, h, w], after it.
        null: [T, D], where to begin.
        step: which one.
        guidance: the guidance scale.
    """
    text = null.detach().to(torch.promote_types(null.dtype, torch.float32), copy=True).requires_grad_()
    optimiser = torch.optim.Adam([text], lr=_RATE * max(1 - step / 100, 1 / 100))
    with torch.no_grad():
        own = moves.predict_text(latents, step)
    best, least = null, math.inf
    for _ in range(_UPDATES):
        with torch.enable_grad():
            nothing = moves.predict_null(latents, step, text[None].to(null.dtype))
            moved = moves.forwards(latents, nothing + guidance * (own - nothing), step)
            loss = (moved - wanted).square().mean()
        if not math.isfinite(loss.item()):
            warnings.warn(f"difffast: the null text of step {step} diverged; the best one is kept", stacklevel=4)
            break
        if loss.item() < least:
            best, least = text.detach().to(null.dtype, copy=True), loss.item()
        if loss.item() < _ENOUGH * (1 + 2 * step):
            break
        (text.grad,) = torch.autograd.grad(loss, [text])
        optimiser.step()
    return best, least


def _check_same(found: Inversion, earlier: Inversion, path: Path) -> None:
    names = ("method", "prompt", "guidance", "size", "steps")
    for name in names:
        here, there = getattr(found, name), getattr(earlier, name)
        if here != there:
            raise ValueError(f"{path} is of another inversion: {name} is {there!r} there, {here!r} here")
    if earlier.null is None or not torch.allclose(found.trajectory.cpu(), earlier.trajectory, atol=1e-3):
        raise ValueError(f"{path} is of another picture, or of another model")
