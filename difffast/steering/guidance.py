"""Classifier-free guidance as stock pipelines compute it, for those who need its result as well."""

from __future__ import annotations

from torch import Tensor


def guide(nothing: Tensor, wanted: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Return what a scheduler is given of both halves' outputs.

    Args:
        nothing, wanted: the UNet's outputs for the negative prompts and for the prompts, both [B, C, h, w].
        scale: the pipeline's ``guidance_scale``.
        rescale: its ``guidance_rescale`` (arXiv:2305.08891, section 3.4); 0 leaves the deviation as it is.
    """
    guided = nothing + scale * (wanted - nothing)
    if not rescale:
        return guided
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    return rescale_noise_cfg(guided, wanted, rescale)
