"""The presets: what one word stands for, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import CfgReuse, EncoderPropagation, MeasuredPlan, Sharing


@dataclass(frozen=True)
class Preset:
    """What one word stands for.

    Attributes:
        propagation: which steps run the encoder, or the whole UNet.
        fused: fused layers, and text keys and values computed once a prompt.
        cfg: at which steps both halves of the batch run under classifier-free guidance; None: at all.
    """

    propagation: Sharing
    fused: bool = True
    cfg: CfgReuse | None = None


#: Everything a preset stands for.  "exact" approximates nothing: every step runs the whole UNet.  "balanced" and
#: "turbo" forecast the UNet's output at the steps where that was measured to change pictures least, and less often
#: where a picture's output still changes: their table has plans and guards, made with the embedded model
#: (bench/measure_plans.py; beside fewer steps and others' ways in docs/results.md).  "faster-diffusion" is the paper's
#: published table, with gaps of up to 14 of 50, which costs the embedded model half of the colours; for large models
#: its authors report no such loss.  Their release always injects prior noise, and so does the preset, where it is meant
#: for the pipeline.
PRESETS: dict[str, Preset] = {
    "exact": Preset(EncoderPropagation(key_steps=1)),
    "balanced": Preset(MeasuredPlan("balanced")),
    "faster-diffusion": Preset(EncoderPropagation(prior_noise=0.003)),
    "turbo": Preset(MeasuredPlan("turbo")),
}
