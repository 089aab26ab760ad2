"""Inversions and edits with several images of a prompt, and latents of a wrong number of rows."""

import warnings

import pytest
import torch
import zoo
from sampling import largest, latents, picture, scheduler
from tolerances import EXACT_FLOAT64

import difffast
from difffast import invert, patched
from difffast.steering.inversion import null_text, style

PROMPT, TARGET = "a ox in fog", "a elk in fog"
STEPS = 3


@pytest.fixture
def plain64(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    return pipe64


def call(pipe, prompts, inversion, **options):
    return pipe(prompts, output_type="latent", **{**inversion.arguments, **options}).images


def test_direct_inversion_restores_every_image_of_the_source(plain64):
    found = invert(plain64, picture(32), PROMPT, "direct", steps=STEPS, guidance=3.0)
    wanted = found.trajectory[-1:].repeat(2, 1, 1, 1)
    start = torch.cat([found.trajectory[:1], torch.randn(1, 4, 8, 8, dtype=torch.float64)])
    with patched(plain64, "exact", steering=found):
        assert torch.equal(call(plain64, PROMPT, found, num_images_per_prompt=2, latents=start), wanted)
        both = call(plain64, [PROMPT, TARGET], found, latents=start)
        assert torch.equal(both[:1], wanted[:1])
        assert largest(both[1:], wanted[1:]) > 1e-3
    with difffast.edit(plain64, PROMPT, TARGET, inversion=found) as edited:
        one = call(plain64, edited.prompts, found)
        repeated = call(plain64, edited.prompts, found, num_images_per_prompt=2)
        given = {"num_images_per_prompt": 2, "latents": start.repeat(2, 1, 1, 1)}
        two = call(plain64, edited.prompts, found, **given)
    for got in (repeated, two):
        assert torch.equal(got[:2], wanted)
        assert largest(got[2], one[1]) <= EXACT_FLOAT64
    assert largest(repeated[3], one[1]) <= EXACT_FLOAT64
    assert largest(two[3], one[1]) > 1e-3  # from another start


def test_every_image_of_the_one_prompt_is_the_noised_picture(plain64):
    found = invert(plain64, picture(32), PROMPT, "ddcm", steps=STEPS, guidance=2.0)
    with patched(plain64, "exact", steering=found):
        got = call(plain64, PROMPT, found, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, found.trajectory.repeat(2, 1, 1, 1))


def test_an_edit_refuses_latents_of_another_number_of_rows(plain64):
    start = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with (
        difffast.edit(plain64, PROMPT, TARGET) as edited,
        pytest.raises(ValueError, match="an edit needs 1 or 4 rows of latents, got 2"),
    ):
        latents(plain64, edited.prompts, steps=2, num_images_per_prompt=2, latents=start)


@pytest.mark.parametrize(
    ("prompts", "images", "rows", "guidance"),
    [(["a", "b"], 2, 2, 7.5), (["a", "b"], 2, 1, 7.5), (["a", "b"], 2, 2, 1.0), ("a", 1, 2, 7.5), ("a", 1, 2, 1.0)],
)
def test_a_patched_pipeline_refuses_latents_that_the_stock_one_refuses(plain64, prompts, images, rows, guidance):
    given = {"steps": 8, "num_images_per_prompt": images, "guidance_scale": guidance}
    given["latents"] = torch.randn(rows, 4, 8, 8, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError)):
        latents(plain64, prompts, **given)
    for preset in ("exact", "balanced"):
        with (
            patched(plain64, preset),
            pytest.raises(ValueError, match=r"as many rows of text as of latents, got \d and \d"),
        ):
            latents(plain64, prompts, **given)
    given["latents"] = torch.randn(images * (len(prompts) if isinstance(prompts, list) else 1), 4, 8, 8).double()
    with patched(plain64, "exact"):
        assert latents(plain64, prompts, **given).isfinite().all()


@pytest.mark.parametrize("method", ["npi", "null", "style"])
def test_a_call_without_guidance_has_no_unconditional_half(plain64, method, monkeypatch):
    for module in (null_text, style):
        monkeypatch.setattr(module, "_UPDATES", 1)
    found = invert(plain64, picture(32), PROMPT, method, steps=2, guidance=7.5)
    start = found.trajectory[:1].repeat(2, 1, 1, 1)
    with patched(plain64, "exact", steering=found), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "difffast: the inversion was optimised for guidance_scale 7.5")
        both = call(plain64, [PROMPT, TARGET], found, latents=start, guidance_scale=1.0)
        alone = [call(plain64, each, found, guidance_scale=1.0) for each in (PROMPT, TARGET)]
    assert largest(both, torch.cat(alone)) <= EXACT_FLOAT64


def test_the_prompt_takes_the_empty_ones_place_in_both_of_two_text_encoders():
    """The noise for the prompt and that in place of the empty prompt's are one, so that guidance changes nothing."""
    pipe = zoo.xl("StableDiffusionXLPipeline")().to(dtype=torch.float64)
    pipe.scheduler = scheduler("DDIM")
    pipe.set_progress_bar_config(disable=True)
    found = invert(pipe, picture((40, 24)), PROMPT, "npi", steps=STEPS, guidance=7.5)
    with patched(pipe, "exact", steering=found):
        got = call(pipe, PROMPT, found)
        assert largest(call(pipe, PROMPT, found, guidance_scale=1.0), got) <= EXACT_FLOAT64
    assert largest(call(pipe, PROMPT, found, guidance_scale=1.0), got) <= EXACT_FLOAT64
    with difffast.edit(pipe, PROMPT, TARGET, inversion=found, cross=0.0, self_=0.0) as edited:
        before, after = call(pipe, edited.prompts, found)
    assert largest(before, got[0]) <= EXACT_FLOAT64
    text, _, pooled, _ = (each for each in pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False))
    other, _, other_pooled, _ = (each for each in pipe.encode_prompt(TARGET, do_classifier_free_guidance=False))
    expected = pipe(
        prompt_embeds=other,
        pooled_prompt_embeds=other_pooled,
        negative_prompt_embeds=text,
        negative_pooled_prompt_embeds=pooled,
        output_type="latent",
        **found.arguments,
    ).images
    assert largest(after, expected[0]) <= EXACT_FLOAT64
