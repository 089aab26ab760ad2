"""DDIM's moves along a schedule, forwards and backwards, with guidance, of one pipeline.

    D(x, e; a -> b) = sqrt(b) (x - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - b) e

Source: DDIM (arXiv 2010.02502), equation 12 without noise.  Where a = 0 (zero terminal SNR, arXiv 2305.08891), latents
are noise, and a velocity v = sqrt(a) e - sqrt(1 - a) x_0 says the picture in its place:
    D(x, v; 0 -> b) = -sqrt(b) v + sqrt(1 - b) x
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.subclass import plain_class
from ..guidance import guide
from ..prompt_calls import encode_alone


class Moves:
    """What a pipeline predicts of a prompt at the steps of a schedule, and the moves that follow.

    Args:
        pipe: the pipeline, with a DDIMScheduler that does not clip.
        unet: its plain UNet.
        prompt: what the picture shows.
        steps: denoising steps.
        size: (height, width) of the picture in pixels.

    Raises:
        ValueError: another scheduler, one that clips, or a schedule that cannot be gone back.
    """

    def __init__(self, pipe: Any, unet: nn.Module, prompt: str, steps: int, size: tuple[int, int]) -> None:
        scheduler = pipe.scheduler
        check_scheduler(scheduler, steps)
        scheduler.set_timesteps(steps)
        self._unet, self._kind = unet, scheduler.config.prediction_type
        self.times = [int(time) for time in scheduler.timesteps]
        apart = scheduler.config.num_train_timesteps // steps
        known, last = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
        #: The roots of a and of 1 - a at the time of each step, and after it.
        self.levels = [read_level(known[time]) for time in self.times]
        self.levels_after = [read_level(known[time - apart] if time >= apart else last) for time in self.times]
        if self.levels[0][0] == self.levels_after[0][1] == 0:
            raise ValueError(
                f"from noise alone (alphas_cumprod[{self.times[0]}] is 0) to the picture it must be at least 2 steps, "
                f"got {steps}: one leaves nothing of the noise"
            )
        self.text, self._added = self._encode(pipe, prompt, size)
        self.null, self._null_added = self._encode(pipe, "", size)

    def _encode(self, pipe: Any, text: str, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        found = encode_alone(pipe, text)
        embeds = found["prompt_embeds"].detach()
        if "pooled_prompt_embeds" not in found:
            return embeds, {}
        pooled = found["pooled_prompt_embeds"].detach()
        if not text and pipe.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        width = pooled.shape[-1] if pipe.text_encoder_2 is None else pipe.text_encoder_2.config.projection_dim
        times = pipe._get_add_time_ids(size, (0, 0), size, dtype=embeds.dtype, text_encoder_projection_dim=width)
        return embeds, {"text_embeds": pooled, "time_ids": times.to(embeds.device)}

    def predict(self, latents: Tensor, step: int, text: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the noise e that the UNet sees in latents [1, C, h, w] at the time of a step, for a text [1, T, D].

        At a level without signal it is the velocity: all latents are noise there, whatever the text.
        """
        call = {"added_cond_kwargs": dict(added)} if added else {}
        time = torch.tensor(self.times[step], device=latents.device)
        run = plain_class(self._unet).__call__
        out = run(self._unet, latents.to(text.dtype), time, encoder_hidden_states=text, return_dict=False, **call)[0]
        out, (root, rest) = out.to(latents.dtype), self.levels[step]
        return root * out + rest * latents if self._kind == "v_prediction" and root else out

    def predict_text(self, latents: Tensor, step: int) -> Tensor:
        """Return the noise for the prompt."""
        return self.predict(latents, step, self.text, self._added)

    def predict_null(self, latents: Tensor, step: int, text: Tensor | None = None) -> Tensor:
        """Return the noise for the empty prompt, or for a text in place of it."""
        return self.predict(latents, step, self.null if text is None else text, self._null_added)

    def guide(self, latents: Tensor, step: int, guidance: float, null: Tensor | None = None) -> Tensor:
        """Return the noise with classifier-free guidance; 1 is the prompt's alone."""
        wanted = self.predict_text(latents, step)
        if guidance == 1:
            return wanted
        nothing = self.predict_null(latents, step, null)
        return guide(nothing, wanted, guidance)

    def forwards(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return the latents after a denoising step; takes what :meth:`predict` returns, or :meth:`guide`."""
        before, (root, rest) = self.levels[step], self.levels_after[step]
        return move(latents, noise, before, (root, rest)) if before[0] else rest * latents - root * noise

    def backwards(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return the latents before a denoising step; takes what :meth:`forwards` takes."""
        before, (root, rest) = self.levels[step], self.levels_after[step]
        return move(latents, noise, (root, rest), before) if before[0] else (latents + root * noise) / rest


def read_level(alpha: Tensor) -> tuple[float, float]:
    """Return the roots of a and of 1 - a, rounded as the scheduler rounds them."""
    return float(alpha**0.5), float((1 - alpha) ** 0.5)


def move(x: Tensor, noise: Tensor, a: tuple[float, float], b: tuple[float, float]) -> Tensor:
    """Return D(x, e; a -> b); a and b by their roots, as of :func:`read_level`."""
    return b[0] * ((x - a[1] * noise) / a[0]) + b[1] * noise


def check_scheduler(scheduler: Any, steps: int, *, noised: bool = False) -> None:
    """Refuse a scheduler whose steps are not DDIM's moves.

    Args:
        scheduler: the pipeline's.
        steps: denoising steps.
        noised: whether pictures are noised instead of inverted, for which that of consistency models will do as well.

    Raises:
        ValueError: it is no DDIMScheduler, clips what it predicts, predicts neither noise nor velocity, or predicts
            noise where there is nothing else.
    """
    name = type(scheduler).__name__
    remedy = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
    if name != "DDIMScheduler" and not (noised and name == "LCMScheduler"):
        raise ValueError(f"inversion follows DDIM's steps and needs a DDIMScheduler, got {name}: {remedy}")
    config = scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError(f"inversion needs a DDIMScheduler that does not clip what it predicts: {remedy}")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"inversion needs predictions of noise or velocity, got {config.prediction_type!r}")
    if config.prediction_type == "epsilon" and not bool(scheduler.alphas_cumprod.all()):
        planned = copy.deepcopy(scheduler)  # the pipeline's may be in the middle of a run
        planned.set_timesteps(steps)
        first = int(planned.timesteps[0])
        if not scheduler.alphas_cumprod[first]:
            raise ValueError(
                f"a prediction of noise needs signal at every step, got alphas_cumprod[{first}] = 0 with {steps} "
                "steps: rescale_betas_zero_snr goes with prediction_type='v_prediction', or timestep_spacing='leading'"
            )
