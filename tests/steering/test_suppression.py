"""Soft-weighted regularisation against its definition by a full SVD, and words found in every kind of prompt."""

import math
from functools import partial

import pytest
import torch
import zoo

import difffast
from difffast.steering.suppression.embeds import drop_words
from difffast.steering.suppression.regularise import regularise

PROMPT = "a red ox by a elk"
#: One token a letter, after the start token: a=1, red=2..4, ox=5 6, by=7 8, a=9, elk=10..12, end=13.
LENGTH = 14


def by_svd(rows, strengthen=False, alpha=1.0):
    """The definition, equations 2 to 4 of the paper, by a full SVD in float64."""
    u, sigma, v = torch.linalg.svd(rows.double(), full_matrices=False)
    changed = 1.2 * torch.exp(0.001 * sigma) * sigma if strengthen else sigma * torch.exp(-alpha * sigma)
    return u @ torch.diag(changed) @ v


@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["centred", "uncentred"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 28.0])
@pytest.mark.parametrize(("strengthen", "alpha"), [(False, 1.0), (False, 0.05), (True, 1.0)])
def test_a_small_decomposition_gives_what_the_full_svd_gives(offset, scale, strengthen, alpha):
    rows = scale * (torch.randn(66, 768, dtype=torch.float64) / 28 + offset)
    rows[40:] = rows[40]  # end tokens that are all alike: the matrix has no full rank
    found = regularise(rows, strengthen=strengthen, alpha=alpha)
    expected = by_svd(rows, strengthen, alpha)
    assert (found - expected).abs().max() <= 1e-12 * max(rows.abs().max(), expected.abs().max())
    assert (found - rows).abs().max() > 1e-6 * rows.abs().max()


def test_more_rows_than_channels_and_half_precision():
    rows = torch.randn(20, 6, dtype=torch.float64)
    assert (regularise(rows) - by_svd(rows)).abs().max() <= 1e-12
    half = rows.half()
    assert torch.equal(regularise(half), by_svd(half).half())


def test_the_words_rows_and_those_from_the_end_token_on_change_alone(pipe64):
    found = difffast.suppress(pipe64, PROMPT, ["ox", "red"])
    text = pipe64.encode_prompt(PROMPT, "cpu", 1, False)[0]
    rows = [2, 3, 4, 5, 6, *range(13, text.shape[1])]
    expected = text.clone()
    expected[0, rows] = by_svd(text[0, rows])
    assert set(found) == {"prompt_embeds"}
    assert (found["prompt_embeds"] - expected).abs().max() <= 1e-12 * text.abs().max()
    others = [row for row in range(text.shape[1]) if row not in rows]
    assert torch.equal(found["prompt_embeds"][0, others], text[0, others])
    assert (found["prompt_embeds"][0, rows] - text[0, rows]).abs().max() > 0.1


def test_a_phrase_counts_wherever_the_prompt_has_it(pipe64):
    text = pipe64.encode_prompt("a ox by a ox", "cpu", 1, False)[0]
    found = difffast.suppress(pipe64, "a ox by a ox", "a ox", alpha=0.3)["prompt_embeds"]
    rows = [1, 2, 3, 6, 7, 8, *range(9, text.shape[1])]
    assert (found[0, rows] - by_svd(text[0, rows], alpha=0.3)).abs().max() <= 1e-12 * text.abs().max()


def test_two_text_encoders_are_regularised_one_by_one():
    pipe = zoo.xl("StableDiffusionXLPipeline")().to(dtype=torch.float64)
    text, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    found = difffast.suppress(pipe, PROMPT, "elk")
    rows, width = [10, 11, 12, *range(13, text.shape[1])], pipe.text_encoder.config.hidden_size
    for part, own in (
        (found["prompt_embeds"][0, :, :width], text[0, :, :width]),
        (found["prompt_embeds"][0, :, width:], text[0, :, width:]),
    ):
        assert (part[rows] - by_svd(own[rows])).abs().max() <= 1e-12 * text.abs().max()
    without = pipe.encode_prompt("a red ox by a", do_classifier_free_guidance=False)[2]
    assert torch.equal(found["pooled_prompt_embeds"], without)
    assert not torch.equal(without, pooled)
    stronger = difffast.suppress(pipe, PROMPT, "elk", strengthen=True)
    assert torch.equal(stronger["pooled_prompt_embeds"], pooled)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(**found, num_inference_steps=2, height=32, width=32, output_type="latent").images
    assert image.isfinite().all()


@pytest.mark.parametrize("kind", ["one encoder", "two encoders"])
def test_the_other_words_may_come_from_the_prompt_without(kind, pipe64):
    pipe = zoo.xl("StableDiffusionXLPipeline")().to(dtype=torch.float64) if kind == "two encoders" else pipe64
    encode = partial(pipe.encode_prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    text, short = (encode(each)[0].detach() for each in (PROMPT, "a by a elk"))  # a=1 by=2 3 a=4 elk=5..7
    expected = text.clone()
    expected[0, [1, 7, 8, 9, 10, 11, 12]] = short[0, [1, 2, 3, 4, 5, 6, 7]]
    rows = [2, 3, 4, 5, 6, *range(13, text.shape[1])]
    found = difffast.suppress(pipe, PROMPT, "red ox", reencode=True)["prompt_embeds"]
    widths = [64, 64] if kind == "two encoders" else [64]
    for part, own in zip(found.split(widths, 2), expected.split(widths, 2), strict=True):
        own[0, rows] = by_svd(own[0, rows])
        assert (part - own).abs().max() <= 1e-12 * text.abs().max()
    assert (found[0, 7] - text[0, 7]).abs().max() > 1e-3
    assert torch.equal(expected[0, 1], text[0, 1])  # what stands before is not changed by what follows
    with pytest.raises(ValueError, match="leave out reencode"):
        difffast.suppress(pipe, PROMPT, "ox", strengthen=True, reencode=True)


def test_what_cannot_be_suppressed_is_refused_by_name(pipe):
    for words, error in ((["cat"], "no word 'cat'"), ([], "at least one word"), ([" "], "at least one word")):
        with pytest.raises(ValueError, match=error):
            difffast.suppress(pipe, PROMPT, words)
    with pytest.raises(TypeError, match="one text, got list"):
        difffast.suppress(pipe, [PROMPT], "ox")
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha must be finite"):
            difffast.suppress(pipe, PROMPT, "ox", alpha=alpha)
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[:] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        difffast.suppress(pipe, PROMPT, "ox")


def test_words_are_dropped_whole_however_they_are_ordered_and_spaced():
    for words in (["red", "red circle"], ["red circle", "red"]):
        assert drop_words("a red circle and a red cat", words) == "a and a cat"
    assert drop_words("a well - known cat", ["well-known"]) == "a cat"
    assert drop_words("a redcircle", ["red circle"]) == "a redcircle"


def test_reencoded_rows_are_of_the_same_encoder_layer_as_the_prompt():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.set_progress_bar_config(disable=True)
    texts = []
    pipe.unet.down_blocks[1].attentions[0].register_forward_pre_hook(
        lambda _m, _a, given: texts.append(given["encoder_hidden_states"][-1]), with_kwargs=True
    )
    with difffast.patched(pipe, "exact", steering=difffast.Suppression("ox", reencode=True, iterations=0)):
        pipe("ox elk", num_inference_steps=5, height=32, width=32, output_type="latent", clip_skip=1)
    alone = pipe.encode_prompt("elk", do_classifier_free_guidance=False, clip_skip=1)[0][0].detach()
    pieces = len(pipe.tokenizer("ox").input_ids) - 2
    rows = len(pipe.tokenizer("elk").input_ids) - 2
    assert (texts[-1][1 + pieces : 1 + pieces + rows] - alone[1 : 1 + rows]).abs().max() <= 1e-5
