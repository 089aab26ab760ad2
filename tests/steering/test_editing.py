"""Edits by prompt against Prompt-to-Prompt with explicit maps, in stock pipelines by processors."""

import pytest
import torch
import zoo
from attention_by_hand import attend
from diffusers import DDIMScheduler
from sampling import largest, latents, scheduler
from tolerances import EXACT_FLOAT64
from torch.nn import functional

import difffast
from difffast import EncoderPropagation, patched
from difffast.steering.editing.attention import attend_edited, average_map, weigh
from difffast.steering.editing.blend import LocalBlend
from difffast.steering.editing.config import EditConfig
from difffast.steering.editing.mappers import Mapper

#: One token a letter: a=1 ox=2 3 in=4 5 fog=6..8, end=9; a=1 elk=2..4 in=5 6 fog=7..9, end=10.
SOURCE, TARGET = "a ox in fog", "a elk in fog"
ADDED = "a big ox in fog"
STEPS = 10
DOUBLE = {"dtype": torch.float64}


def replace_mapper(rows):
    mix = torch.zeros(rows, rows, **DOUBLE)
    mix[0, 0] = mix[1, 1] = 1
    mix[2:4, 2:5] = 1 / 3
    for i in range(4, rows - 1):
        mix[i, i + 1] = 1
    mix[rows - 1, rows - 1] = 1  # which has fallen off
    return mix, torch.ones(rows, **DOUBLE)


def refine_mapper(rows):
    """ADDED has "b i g" at 2..4; "i" and "g" also are in "in" and "fog", but the subsequence is longest without."""
    mix, keep = torch.zeros(rows, rows, **DOUBLE), torch.ones(rows, **DOUBLE)
    keep[2:5] = 0
    mix[0, 0] = mix[1, 1] = 1
    for i in range(2, rows - 3):
        mix[i, i + 3] = 1
    return mix, keep


class Explicit:
    """Prompt-to-Prompt as it is written: maps of every layer, those of the last row edited."""

    def __init__(self, mix, keep, factors, cross, itself, uncond=0, pixels=64):
        self.mix, self.keep, self.factors = mix, keep, factors
        self.cross, self.itself, self.uncond = cross, itself, uncond
        self.step, self.seen, self.pixels = 0, [], pixels

    def __call__(self, layer, hidden, encoder_hidden_states=None, **_):
        def edit(p):
            if encoder_hidden_states is None:
                if self.step < self.itself and hidden.shape[1] * 16 <= self.pixels:
                    p = torch.cat([p[:-1], p[-2:-1]])
                if self.step < self.uncond and hidden.shape[1] * 4 <= self.pixels:
                    p = torch.cat([p[:1], p[:1], p[2:]])
                return p
            edited = self.factors * (self.keep * (p[-2:-1] @ self.mix) + (1 - self.keep) * p[-1:])
            if self.step < self.cross:
                p = torch.cat([p[:-1], edited])
            if hidden.shape[1] == 4:
                self.seen.append(p[-2:].mean(1))
            return p

        return attend(layer, hidden, encoder_hidden_states, edit)


def by_hand(pipe, target, explicit, blend=None, steps=STEPS, **options):
    """Final latents [2, ...]; ``blend``: (tokens of the source's word, of the target's)."""
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), **DOUBLE).repeat(2, 1, 1, 1)
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(dict.fromkeys(before, explicit))
    total = [torch.zeros(2, 2, 2, **DOUBLE)]

    def after(_pipe, step, _timestep, tensors):
        if blend is not None:
            for maps in explicit.seen:
                for row, tokens in enumerate(blend):
                    total[0][row] += maps[row][:, tokens].sum(-1).unflatten(0, (2, 2))
            if step >= 0.2 * steps:
                wide = functional.max_pool2d(total[0][:, None], 3, 1, 1)
                large = functional.interpolate(wide, (8, 8))
                there = (large / large.amax((2, 3), keepdim=True) > 0.3).any(0, keepdim=True)
                z = tensors["latents"]
                tensors["latents"] = torch.cat([z[:1], z[:1] + there * (z[1:] - z[:1])])
        explicit.step, explicit.seen = step + 1, []
        return tensors

    try:
        return latents(pipe, [SOURCE, target], steps=steps, latents=start, callback_on_step_end=after, **options)
    finally:
        pipe.unet.set_attn_processor(before)


def ours(pipe, target, preset=None, steps=STEPS, prompts=None, **options):
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), **DOUBLE)
    start[:1] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), **DOUBLE)
    with difffast.edit(pipe, SOURCE, target, **options) as edited:
        return latents(pipe, prompts or edited.prompts, steps=steps, latents=start, **(preset or {}))


@pytest.fixture
def small(pipe64):
    """Layers of 8x8 and 4x4 pixels; a third level of 2x2, a sixteenth of the latents' size, has cross-attention."""
    pipe64.unet = zoo.three_levels().double()
    pipe64.scheduler = scheduler("DDIM")
    return pipe64


def test_replacing_with_both_windows(small):
    mix, keep = replace_mapper(77)
    explicit = Explicit(mix, keep, torch.ones(77, **DOUBLE), cross=6, itself=3, uncond=2)
    expected = by_hand(small, TARGET, explicit)
    found = ours(small, TARGET, cross=0.6, self_=0.3, uncond_self=0.2)
    assert largest(found, expected) <= EXACT_FLOAT64
    plain = ours(small, TARGET, cross=0.0, self_=0.0)
    assert largest(found[1:], plain[1:]) > 1e-3
    assert largest(found[:1], plain[:1]) <= EXACT_FLOAT64


def test_refining_reweighting_and_local_blend(small):
    mix, keep = refine_mapper(77)
    factors = torch.ones(77, **DOUBLE)
    factors[9:12] = 2.5  # fog
    explicit = Explicit(mix, keep, factors, cross=8, itself=0)
    expected = by_hand(small, ADDED, explicit, blend=([2, 3], [5, 6]))
    options = {"cross": 0.8, "self_": 0.0, "reweight": {"fog": 2.5}}
    found = ours(small, ADDED, blend=("ox", "ox"), **options)
    assert largest(found, expected) <= EXACT_FLOAT64


def test_the_blend_keeps_what_is_away_from_its_words():
    """In the run above a 3x3 window covers the 2x2 maps; here it does not."""
    blend, maps = LocalBlend(0.3), torch.zeros(2, 1, 6, 6, **DOUBLE)
    maps[0, 0, 0, 0], maps[1, 0, 5, 5], maps[1, 0, 2, 5] = 1.0, 1.0, 0.2  # the last is below the threshold
    blend.add(maps[0], maps[1])
    latents_ = torch.randn(2, 4, 6, 6, **DOUBLE)
    changed = torch.zeros(6, 6, dtype=torch.bool)
    changed[:2, :2] = changed[4:, 4:] = True
    assert torch.equal(blend.mix(latents_), torch.stack([latents_[0], torch.where(changed, *latents_.flip(0))]))


def test_the_released_windows_and_tail(small):
    mix = torch.eye(77, **DOUBLE)
    mix[2:4] = 0
    mix[2:4, 2:5] = 1 / 3
    mix[4, 4] = 0
    explicit = Explicit(
        mix, torch.ones(77, **DOUBLE), torch.ones(77, **DOUBLE), cross=int(0.77 * 11), itself=int(0.37 * 10)
    )
    mix[4] = 0  # row 4 of the source is followed by what stands at 5
    found = ours(small, TARGET, cross=0.77, self_=0.37, mode="reference")
    assert largest(found, by_hand(small, TARGET, explicit)) <= EXACT_FLOAT64
    config = EditConfig(SOURCE, TARGET, cross=0.77, self_=0.37)
    assert (config.count_cross_steps(10), config.count_self_steps(10)) == (8, 4)


def test_the_released_tail_of_a_refined_prompt(small):
    """ADDED ends at 12, SOURCE at 9: what stands after the end takes its attention from its own place."""
    mix, keep = refine_mapper(77)
    mix[:, 13:] = torch.eye(77, **DOUBLE)[:, 13:]
    explicit = Explicit(mix, keep, torch.ones(77, **DOUBLE), cross=int(0.77 * 11), itself=0)
    found = ours(small, ADDED, cross=0.77, self_=0.0, mode="reference")
    assert largest(found, by_hand(small, ADDED, explicit)) <= EXACT_FLOAT64


def test_without_guidance_of_several_images_and_unfused(small):
    given = {"preset": {"guidance_scale": 1.0}, "steps": 4, "cross": 0.5, "self_": 0.5}
    mix, keep = replace_mapper(77)
    expected = by_hand(small, TARGET, Explicit(mix, keep, torch.ones(77, **DOUBLE), 2, 2), steps=4, guidance_scale=1.0)
    assert largest(ours(small, TARGET, **given), expected) <= EXACT_FLOAT64
    with patched(small, "exact", fused=False):
        assert largest(ours(small, TARGET, **given), expected) <= EXACT_FLOAT64
    with difffast.edit(small, SOURCE, TARGET, cross=0.5, self_=0.5) as edited:
        start = torch.randn(2, 4, 8, 8, **DOUBLE).repeat(2, 1, 1, 1)
        found = latents(small, edited.prompts, steps=2, num_images_per_prompt=2, latents=start)
        alone = latents(small, edited.prompts, steps=2, latents=start[[1, 1]])
    assert largest(found[[1, 3]], alone) <= EXACT_FLOAT64


def test_two_text_encoders_velocity_and_another_size():
    pipe = zoo.xl("StableDiffusionXLPipeline")().to(dtype=torch.float64)
    pipe.scheduler = DDIMScheduler.from_config(scheduler("DDIM").config, prediction_type="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "height": 24, "width": 40, "output_type": "latent"}
    start = torch.randn(1, 4, 6, 10, **DOUBLE).repeat(2, 1, 1, 1)
    mix, keep = replace_mapper(77)
    explicit = Explicit(mix, keep, torch.ones(77, **DOUBLE), cross=2, itself=0, uncond=2, pixels=60)

    def after(_pipe, step, _timestep, tensors):
        explicit.step = step + 1
        return tensors

    with difffast.edit(pipe, SOURCE, TARGET, cross=0.5, self_=0.0, uncond_self=0.5) as edited:
        found = pipe(edited.prompts, latents=start, **given).images
    plain = pipe([SOURCE, TARGET], latents=start, **given).images
    pipe.unet.set_attn_processor(dict.fromkeys(pipe.unet.attn_processors, explicit))
    expected = pipe([SOURCE, TARGET], latents=start, callback_on_step_end=after, **given).images
    assert largest(found, expected) <= EXACT_FLOAT64
    assert largest(found, plain) > 1e-3


def test_steps_after_the_window_may_share(small):
    found = []
    for parallel in (True, False):
        with patched(small, propagation=EncoderPropagation(key_steps=4, parallel=parallel)) as report:
            found.append(ours(small, TARGET, steps=16, cross=0.5, self_=0.25))
            assert largest(*found[-1].chunk(2)) > 1e-3
        assert report.last_run is None or report.last_run.key <= 16
    assert largest(*found) <= EXACT_FLOAT64


@pytest.mark.parametrize("tokens", [7, 130])
@pytest.mark.parametrize("with_own", [True, False])
def test_edited_attention_is_that_of_explicit_maps(with_own, tokens):
    query, keys = torch.randn(2, 2, 3, 9, 8, **DOUBLE), torch.randn(2, 2, 3, tokens, 8, **DOUBLE)
    values = torch.randn(2, 3, tokens, 8, **DOUBLE) + 3
    mapper = Mapper(torch.rand(tokens, tokens, **DOUBLE), (torch.rand(tokens, **DOUBLE) > 0.4).double())
    mix, own = weigh(mapper, torch.rand(tokens, **DOUBLE) * 2, 0.75 if with_own else 1.0)
    maps = [(q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) for q, k in zip(query, keys, strict=True)]
    expected = (maps[0] @ mix + (maps[1] * own if with_own else 0)) @ values
    found = attend_edited((query[0], keys[0]), (query[1], keys[1]), values, mix, own if with_own else None)
    assert largest(found, expected) <= 1e-12 * float(expected.abs().max())
    words = (torch.arange(tokens) == 2).double()
    seen = average_map(maps[0].mean(1), maps[1].mean(1), mix, own, words)
    assert largest(seen, (maps[0] @ mix + maps[1] * own).mean(1) @ words) <= 1e-12


def test_everything_is_as_before_and_errors_name_what_is_wrong(small):
    plain = latents(small, [SOURCE, TARGET], steps=2)
    with pytest.raises(ValueError, match="must be called with its prompts"):
        ours(small, TARGET, prompts=[SOURCE, SOURCE])
    for options, error in (
        ({"kind": "replace", "target": "a elk"}, "as many words in both prompts, got 4"),
        ({"reweight": {"cat": 2}}, "no word 'cat' in the prompt 'a elk in fog'"),
        ({"blend": ("elk", "elk")}, "no word 'elk' in the prompt 'a ox in fog'"),
        ({"blend": "ox"}, "blend must be a word of the source and one of the target"),
        ({"reweight": {"elk": float("nan")}}, "finite factors, got 'elk': nan"),
        ({"cross": 1.5}, "cross must be a share"),
        ({"mode": "code"}, "mode must be one of paper, reference"),
    ):
        with pytest.raises(ValueError, match=error):
            ours(small, **{"target": TARGET, **options})
    with pytest.raises(TypeError, match="selves"), difffast.edit(small, SOURCE, TARGET, selves=1):
        pass
    assert torch.equal(latents(small, [SOURCE, TARGET], steps=2), plain)
    with patched(small, "exact") as report:
        with difffast.edit(small, SOURCE, TARGET):
            pass
        assert "attn2" in str(report)
        assert largest(latents(small, [SOURCE, TARGET], steps=2), plain) <= EXACT_FLOAT64
