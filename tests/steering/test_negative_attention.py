"""NegativeAttention against the paper's formula, in the operator's layout and in stock pipelines by a processor."""

import math

import if_zoo
import pytest
import torch
import zoo
from sampling import largest, latents, scheduler
from tolerances import EXACT_FLOAT64, LATENTS_FLOAT64

import difffast
from difffast import CfgReuse, EncoderPropagation, NegativeAttention, patched
from difffast.steering.negative_attention import lead_away

NEGATIVE = "elk in fog"
METHOD = {"scale": 4.0, "tau": 1.2, "alpha": 0.6}


def formula(positive, negative, scale, tau, alpha):
    """[B, N, C], token by token, as equations 5 to 7 are written."""
    guided = scale * positive - (scale - 1) * negative
    out = torch.empty_like(positive)
    for image in range(len(positive)):
        for token in range(positive.shape[1]):
            z, g = positive[image, token], guided[image, token]
            size, own = sum(abs(float(x)) for x in g), sum(abs(float(x)) for x in z)
            if size > 0:
                ratio = size / own if own else math.inf
                g = g * (tau * own / size if ratio > tau else 1.0)
            out[image, token] = alpha * g + (1 - alpha) * z
    return out


class Processor:
    """The method in a stock layer: attends to both texts, and changes the last rows of the batch."""

    def __init__(self, negative, **method):
        self.negative, self.method = negative, method

    def attend(self, layer, query, text):
        keys, values = (to(text).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for to in (layer.to_k, layer.to_v))
        logits = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)

    def __call__(self, layer, hidden, encoder_hidden_states=None, **_):
        query = layer.to_q(hidden).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        out = self.attend(layer, query, encoder_hidden_states)
        images = len(self.negative)
        negative = self.attend(layer, query[-images:], self.negative)
        scale, tau, alpha = (self.method[name] for name in ("scale", "tau", "alpha"))
        own = out[-images:]
        guided = scale * own - (scale - 1) * negative
        ratio = guided.norm(p=1, dim=-1, keepdim=True) / own.norm(p=1, dim=-1, keepdim=True)
        guided = guided * ratio.clamp(max=tau) / ratio
        out = torch.cat([out[:-images], alpha * guided + (1 - alpha) * own])
        return layer.to_out[0](out)


def by_hand(pipe, prompt, negative, images=1, **options):
    """Final latents of a stock run with the processor in every attn2 layer."""
    text = pipe.encode_prompt(negative, "cpu", images, False)[0].detach()
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(
        {name: Processor(text, **METHOD) if "attn2" in name else each for name, each in before.items()}
    )
    try:
        return latents(pipe, prompt, num_images_per_prompt=images, **options)
    finally:
        pipe.unet.set_attn_processor(before)


@pytest.mark.parametrize("offset", [0.0, 5.0], ids=["centred", "uncentred"])
def test_the_epilogue_is_the_formula(offset):
    positive, negative = torch.randn(2, 3, 7, 2, 8, dtype=torch.float64) + offset
    positive[0, 0] = 0  # r is infinite
    positive[1, 1], negative[1, 1] = 0, 0  # and 0 / 0
    negative[0, 1] = positive[0, 1]  # the limit does not count
    by_head = [x.transpose(1, 2) for x in (positive, negative)]
    found = lead_away(*by_head, **METHOD).transpose(1, 2).flatten(2)
    expected = formula(positive.flatten(2), negative.flatten(2), **METHOD)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert torch.equal(found[0, 0], torch.zeros(16, dtype=torch.float64))
    half = [x.to(torch.float16) for x in by_head]
    assert (lead_away(*half, **METHOD) - found.unflatten(-1, (2, 8)).transpose(1, 2)).abs().max() < 0.05 * (1 + offset)


@pytest.mark.parametrize(
    ("guidance", "images", "fused"),
    [(1.0, 1, True), (7.5, 2, True), (1.0, 2, False)],
    ids=["alone", "guided", "unfused"],
)
def test_a_run_is_the_formula_in_every_layer(pipe64, guidance, images, fused):
    given = {"guidance_scale": guidance, "steps": 3}
    with patched(pipe64, "exact", fused=fused, steering=NegativeAttention(**METHOD)) as report:
        found = latents(pipe64, negative_prompt=NEGATIVE, num_images_per_prompt=images, **given)
    expected = by_hand(pipe64, "a red circle", NEGATIVE, images, negative_prompt=NEGATIVE, **given)
    plain = latents(pipe64, negative_prompt=NEGATIVE, num_images_per_prompt=images, **given)
    assert largest(found, expected) <= EXACT_FLOAT64
    assert largest(found, plain) > 1e-3
    assert "negative prompts inside attention" in str(report)
    if fused:  # once a prompt; the negative text's are not counted
        assert report.last_run.text_kv["reused"] == 2 * report.last_run.text_kv["computed"]


def test_without_a_negative_prompt_it_is_the_empty_one(pipe64):
    with patched(pipe64, "exact", steering=NegativeAttention(**METHOD)):
        found = latents(pipe64, guidance_scale=1.0, steps=2)
    assert largest(found, by_hand(pipe64, "a red circle", "", guidance_scale=1.0, steps=2)) <= EXACT_FLOAT64
    embeds = pipe64.encode_prompt(NEGATIVE, "cpu", 1, False)[0].detach()
    given = {"guidance_scale": 3.0, "steps": 2}
    with patched(pipe64, "exact", steering=NegativeAttention(**METHOD)):
        found = latents(pipe64, negative_prompt_embeds=embeds, **given)
    expected = by_hand(pipe64, "a red circle", NEGATIVE, negative_prompt=NEGATIVE, **given)
    assert largest(found, expected) <= EXACT_FLOAT64


@pytest.mark.parametrize("off", [{"scale": 1.0}, {"alpha": 0.0}])
def test_off_changes_no_bit(pipe, off):
    with patched(pipe, "exact"):
        plain = latents(pipe, guidance_scale=1.0, steps=3)
    with patched(pipe, "exact", steering=NegativeAttention(**off)):
        assert torch.equal(latents(pipe, guidance_scale=1.0, negative_prompt=NEGATIVE, steps=3), plain)


@pytest.mark.parametrize("cfg", [None, CfgReuse()], ids=["both halves", "half"])
def test_steps_that_share_are_edited_alike(pipe64, cfg):
    """Decoded together or one at a time, both halves of guidance's batch or one."""
    pipe64.scheduler = scheduler("DDIM")
    found = []
    for parallel in (True, False):
        sharing = EncoderPropagation(key_steps=4, parallel=parallel)
        with patched(pipe64, propagation=sharing, cfg=cfg, steering=NegativeAttention(**METHOD)) as report:
            found.append(latents(pipe64, negative_prompt=NEGATIVE, steps=12))
            assert report.last_run.key < 12
    assert largest(*found) <= LATENTS_FLOAT64
    with patched(pipe64, propagation=EncoderPropagation(key_steps=4), cfg=cfg):
        assert largest(found[0], latents(pipe64, negative_prompt=NEGATIVE, steps=12)) > 1e-3


def test_several_prompts_and_two_text_encoders():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 1.0}

    def run(prompts, negative, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, negative_prompt=negative, generator=generators, **given).images

    with patched(pipe, "exact", steering=NegativeAttention(**METHOD)):
        both = run(["a ox", "a elk"], ["fog", "red"], (0, 1))
        apart = torch.cat([run(["a ox"], ["fog"], (0,)), run(["a elk"], ["red"], (1,))])
    assert largest(both, apart) <= 1e-4
    assert largest(both, run(["a ox", "a elk"], ["fog", "red"], (0, 1))) > 1e-3


@pytest.mark.parametrize(
    "negative", [("fog", "red"), (None, "red"), (["fog"], "red"), ("fog", "")], ids=["both", "second", "list", "empty"]
)
def test_the_second_text_encoder_has_its_own_negative_prompt(negative):
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.set_progress_bar_config(disable=True)
    first, second = negative

    def run(**given):
        given |= {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 1.0}
        return pipe("a ox", generator=torch.Generator().manual_seed(0), **given).images

    plain = pipe.encode_prompt(first or "", second or first, do_classifier_free_guidance=False)
    with patched(pipe, "exact", steering=NegativeAttention(**METHOD)):
        expected = run(negative_prompt_embeds=plain[0].detach(), negative_pooled_prompt_embeds=plain[2].detach())
        assert largest(run(negative_prompt=first, negative_prompt_2=second), expected) <= 1e-5


def test_maps_are_of_the_prompt(pipe64):
    with patched(pipe64, "exact", steering=NegativeAttention(**METHOD)), difffast.collect_maps(pipe64) as maps:
        latents(pipe64, negative_prompt=NEGATIVE, guidance_scale=1.0, steps=2)
    assert torch.allclose(maps.mean(maps.layers[0]).sum(-1), torch.ones((), dtype=torch.float64))


def test_what_cannot_be_is_refused_and_nothing_stays(pipe):
    with pytest.raises(ValueError, match=r"alpha must lie in 0 \.\. 1, got 2"):
        NegativeAttention(alpha=2)
    with pytest.raises(ValueError, match="scale and tau must be finite and at least 1"):
        NegativeAttention(scale=math.nan)
    with pytest.raises(TypeError, match="tau must be a number, got '1'"):
        NegativeAttention(tau="1")
    deepfloyd = if_zoo.deepfloyd("IFPipeline")()
    with pytest.raises(ValueError, match="one softmax"):
        difffast.patch(deepfloyd, "exact", steering=NegativeAttention())
    with (
        patched(pipe, "exact", steering=NegativeAttention()),
        pytest.raises(ValueError, match="4 prompts need 1 negative prompt or 4, got 2"),
    ):
        latents(pipe, ["a", "b", "c", "d"], negative_prompt=["fog", "red"], guidance_scale=1.0, steps=1)
    plain = latents(pipe, steps=2)
    with pytest.raises(ValueError, match="overridden once"):
        difffast.patch(pipe, "exact", steering=(NegativeAttention(), difffast.SafeGuard("fog")))
    assert torch.equal(latents(pipe, steps=2), plain)
