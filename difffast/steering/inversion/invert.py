"""invert: find the noise, and what else it takes, from which a pipeline makes a given picture.

Sources: DDIM (arXiv 2010.02502); null-text inversion (2211.09794); negative-prompt inversion, NPI (2305.16807); direct
inversion (2310.01506); EDICT (2211.12446); StyleDiffusion (2303.15649); InfEdit
(2312.04965).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...plan.key_steps import check_int
from ...surgery.freezing import freeze
from ...target import Target
from ..negative_attention import refuse_attention_edits
from .edict import invert_edict
from .inversion import METHODS, Inversion
from .moves import Moves, check_scheduler
from .networks import read_features
from .null_text import NullFit
from .style import StyleFit, use_text_layers

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...support import Pipeline


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
        pipe: a pipeline of Stable Diffusion's kind, with a DDIMScheduler; for "ddcm" an LCMScheduler will do as well.
        image: the picture, its sides multiples of the autoencoder's factor; of other modes than RGB it is converted.
        prompt: what it shows.
        method: "ddim" keeps the noise alone; "direct" also the way, which the source's latents are put back to at every
            step, so that it comes out exactly; "npi" has the prompt in place of the empty one; "null" optimises a text
            in place of the empty one, at every step; "edict" couples two noises, which is exact without a memory;
            "style" optimises networks that make other values of the prompt (StyleDiffusion), from the tokens of the
            pipeline's ``image_encoder``, or from the latents where it has none; "ddcm" inverts nothing (InfEdit): it
            keeps the picture, which is noised anew at every step.
        steps: denoising steps.
        guidance: the guidance scale of the reconstruction.
        checkpoint: a file to which "null" and "style" write after every step, and from which they go on if it is there.

    Returns:
        The inversion, with ``save`` and ``load``.

    Raises:
        TypeError, ValueError: something else than a picture or one text, unknown method, a picture of a wrong size,
            another scheduler, or a checkpoint of another inversion.
    """
    _check_types(image, prompt, guidance, checkpoint)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if check_int("steps", steps) < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 1 <= guidance < math.inf:
        raise ValueError(f"guidance must be finite and at least 1, got {guidance}")
    target = Target.of(pipe)
    if method == "style":
        refuse_attention_edits(pipe, target.unet)
    size = (image.height, image.width)
    with torch.no_grad():
        start = encode_image(pipe, image)
        if method == "ddcm":
            check_scheduler(pipe.scheduler, steps, noised=True)
            return Inversion(method, prompt, guidance, size, start, steps)
        moves = Moves(pipe, target.unet, prompt, steps, size)
        if method == "edict":
            return Inversion(method, prompt, guidance, size, invert_edict(pipe, moves, start, guidance), steps)
        trajectory = _go_back(pipe, moves, start)
        found = Inversion(method, prompt, guidance, size, trajectory, steps)
        if method == "style":
            found = dataclasses.replace(found, features=read_features(pipe, image, start, moves.text))
    if method not in ("null", "style"):
        return found
    with freeze(target.unet), use_text_layers(target.unet):
        fit = NullFit(moves, guidance) if method == "null" else StyleFit(moves, target.unet, found)
        return _optimise(pipe, moves, found, fit, None if checkpoint is None else Path(checkpoint))


def _check_types(image: Any, prompt: Any, guidance: Any, checkpoint: Any) -> None:
    from PIL.Image import Image

    for name, value, kinds, wanted in (
        ("image", image, Image, "a PIL image"),
        ("prompt", prompt, str, "one text"),
        ("guidance", guidance, (int, float), "a number"),
        ("checkpoint", checkpoint, (str, Path, type(None)), "a path"),
    ):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


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


class _Fit(Protocol):
    """Somebody who finds, step by step, what else a picture takes."""

    def resume(self, earlier: Inversion) -> None: ...

    def optimise(self, latents: Tensor, wanted: Tensor, step: int) -> float: ...

    def predict(self, latents: Tensor, step: int) -> Tensor: ...

    def collect(self) -> dict[str, Any]: ...


def _optimise(pipe: Any, moves: Moves, found: Inversion, fit: _Fit, checkpoint: Path | None) -> Inversion:
    """Return the inversion with what is found at every step, from the last one that a checkpoint has."""
    losses: list[float] = []
    if checkpoint is not None and checkpoint.is_file():
        earlier = Inversion.load(checkpoint)
        _check_same(found, earlier, checkpoint)
        fit.resume(earlier)
        losses = list(earlier.losses)
    latents = found.trajectory[:1]
    with pipe.progress_bar(total=found.steps) as bar:
        for step in range(found.steps):
            if step >= len(losses):
                losses.append(fit.optimise(latents, found.trajectory[step + 1], step))
                if checkpoint is not None:
                    dataclasses.replace(found, **fit.collect(), losses=tuple(losses)).save(checkpoint)
            with torch.no_grad():
                latents = moves.forwards(latents, fit.predict(latents, step), step)
            bar.update()
    return dataclasses.replace(found, **fit.collect(), losses=tuple(losses))


def _check_same(found: Inversion, earlier: Inversion, path: Path) -> None:
    names = ("method", "prompt", "guidance", "size", "steps")
    for name in names:
        here, there = getattr(found, name), getattr(earlier, name)
        if here != there:
            raise ValueError(f"{path} is of another inversion: {name} is {there!r} there, {here!r} here")
    for here, there in ((found.trajectory, earlier.trajectory), (found.features, earlier.features)):
        if here is not None and not (there.shape == here.shape and torch.allclose(here.cpu(), there, atol=1e-3)):
            raise ValueError(f"{path} is of another picture, or of another model")
