"""The presets: what one word stands for, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import CfgReuse, EncoderPropagation, FeatureReuse, Sharing


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


#: Everything a preset stands for.  "exact" approximates nothing: every step runs the whole UNet.  "balanced" keeps what
#: the embedded model's pictures show (bench/bench_fidelity.py).  The published table, with gaps of up to 14 of 50,
#: costs it half of the colours, most of them by the gap at the end; for large models its authors report no such loss.
#: Their release always injects prior noise, and so does "faster-diffusion", where it is meant for the pipeline.
#: "turbo" is the widest interval that cost it none (36 prompts, 50 steps: every 4th .99 of the things bound, stock .97,
#: every 5th .85; extrapolated features bound fewer at every interval, key steps closer around any center did not help).
#: Between key steps both run the conditional half alone: over three or four steps that costs nothing (48
#: prompts: no thing lost, PSNR 35.3 -> 36.6 and 30.4 -> 31.2 dB), over six or eight it costs 13 points.
PRESETS: dict[str, Preset] = {
    "exact": Preset(EncoderPropagation(key_steps=1)),
    "balanced": Preset(EncoderPropagation(key_steps=0.06), cfg=CfgReuse(1)),
    "faster-diffusion": Preset(EncoderPropagation(prior_noise=0.003)),
    "turbo": Preset(FeatureReuse(interval=0.08), cfg=CfgReuse(1)),
}
