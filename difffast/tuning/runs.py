"""One measured call of a pipeline, whatever it takes and returns: text or none, pictures or videos, a VAE or none."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..options import suggest
from ..surgery.subclass import plain_class

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
#: What :func:`run_once` gives by itself.
_OWN = ("self", "prompt", "num_inference_steps", "generator", "output_type", "return_dict")


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Check the further arguments of a pipeline's call before anything is run.

    Raises:
        TypeError: a name that the call does not have, or one without which it cannot run.
    """
    parameters = inspect.signature(plain_class(pipe).__call__).parameters
    named = [name for name, each in parameters.items() if each.kind not in _OPEN]
    free = [name for name in named if name not in _OWN]
    for name in call:
        if name not in free:
            raise TypeError(
                f"{type(pipe).__name__} takes no {name!r} beside what tune gives it{suggest(name, free)}; "
                f"it takes: {', '.join(free)}"
            )
    for name, each in parameters.items():
        required = each.default is inspect.Parameter.empty and each.kind not in _OPEN
        if required and name not in call and name not in _OWN:
            raise TypeError(f"{type(pipe).__name__} needs {name!r}: tune(pipe, steps, {name}=...)")


def run_once(pipe: Any, prompt: str, seed: int, steps: int, call: Mapping[str, Any]) -> tuple[float, Tensor]:
    """Return the seconds of one call, and its final latents; pixels where the pipeline has no latents."""
    taken = inspect.signature(plain_class(pipe).__call__).parameters
    given: dict[str, Any] = {
        "prompt": prompt,
        "num_inference_steps": steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": _choose_output(pipe),
    }
    if call.get("prompt_embeds") is not None or call.get("image_embeds") is not None:
        del given["prompt"]
    given = {name: value for name, value in given.items() if name in taken}
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)  # some pipelines encode their picture with the global generator
        start = time.perf_counter()
        latents = _as_tensor(pipe(**given, **call)[0])
        if devices:
            torch.cuda.synchronize()
        return time.perf_counter() - start, latents


def compare(pipe: Any, found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return PSNR [dB] of the pictures, and the relative error of the latents.

    Where a pipeline's VAE does not decode single pictures (videos of some kinds) or there is none, both are of what
    the pipeline returned.

    Returns:
        "psnr_db", infinite where nothing differs, and "latent_error".  Where a result is not finite, both are the worst
        that there is.
    """
    error = float((found - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
    if not math.isfinite(error):
        return {"psnr_db": -math.inf, "latent_error": math.inf}
    pictures = [_decode(pipe, each) for each in (found, expected)]
    mean = float((pictures[0] - pictures[1]).square().mean())
    peak = 1.0 if pictures[1].amax() <= 1 else float(pictures[1].amax() - pictures[1].amin())
    return {"psnr_db": -10 * math.log10(mean / peak**2) if mean else math.inf, "latent_error": error}


#: Pipelines that have latents but do not return them.
_PIXELS_ALONE = (
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
    "MarigoldDepthPipeline",
    "MarigoldNormalsPipeline",
    "MarigoldIntrinsicsPipeline",
)


def _choose_output(pipe: Any) -> str:
    """Return the ``output_type`` that spares the decoding of latents, where the pipeline has any to return."""
    has_latents = any(getattr(pipe, name, None) is not None for name in ("vae", "movq"))
    return "latent" if has_latents and type(pipe).__name__ not in _PIXELS_ALONE else "pt"


def _decode(pipe: Any, latents: Tensor) -> Tensor:
    """Return pictures with values 0 .. 1, or the latents where the VAE does not decode single pictures."""
    vae = getattr(pipe, "vae", None)
    if type(vae).__name__ != "AutoencoderKL" or latents.ndim not in (4, 5):
        return latents.float()
    if latents.ndim == 5:  # [B, C, frames, height, width]
        latents = latents.transpose(1, 2).flatten(0, 1)
    if latents.shape[1] != vae.config.latent_channels:
        return latents.float()
    with torch.no_grad():
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def _as_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (list, tuple)):
        return torch.stack([_as_tensor(each) for each in output])
    return torch.as_tensor(np.asarray(output))


@contextlib.contextmanager
def hide_progress(pipe: Any) -> Iterator[None]:
    """Show no progress bar for each of the pipeline's calls inside the block."""
    earlier = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(earlier or {}), "disable": True})
    try:
        yield
    finally:
        if earlier is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = earlier
