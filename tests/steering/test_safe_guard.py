"""SafeGuard against SAFREE's formulas written out, in stock calls of a pipeline."""

import math

import pytest
import torch
import zoo
from sampling import largest, latents

import difffast
from difffast.steering.safe_guard import choose_tokens

CONCEPTS = ("a wolf", "blood")
PROMPT = "red wolf"


def pooled(pipe, ids, seen=None):
    mask = torch.tensor([seen if seen is not None else [1] * len(ids)])
    with torch.no_grad():
        return pipe.text_encoder(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0, -1]


def project(vectors):
    """The projector on the span of the rows: V^T (V V^T)^-1 V."""
    return vectors.T @ torch.linalg.pinv(vectors @ vectors.T) @ vectors


def by_hand(pipe, prompt, text):
    """-> (changed rows' positions, the embedding with them changed, b)"""
    ids = pipe.tokenizer(prompt).input_ids
    concepts = project(torch.stack([pooled(pipe, pipe.tokenizer(c).input_ids) for c in CONCEPTS]))
    hidden = torch.stack([pooled(pipe, ids, [int(j != i) for j in range(len(ids))]) for i in range(1, len(ids) - 1)])
    eye = torch.eye(len(concepts), dtype=torch.float64)
    far = [float(((eye - concepts) @ m).norm()) for m in hidden]
    own = project(hidden)
    changed, tokens = text.clone(), []
    for i, distance in enumerate(far):
        others = [each for j, each in enumerate(far) if j != i]
        if distance >= 1.01 * sum(others) / len(others):
            tokens.append(i + 1)
            changed[i + 1] = (eye - concepts) @ own @ text[i + 1]
    cosines = [float(text[i] @ changed[i] / (text[i].norm() * changed[i].norm())) for i in range(1, len(ids) - 1)]
    return tuple(tokens), changed, 1 - sum(cosines) / len(cosines)


@torch.no_grad()
def test_tokens_rows_and_steps_are_the_formulas(pipe64):
    text, negative = pipe64.encode_prompt(PROMPT, "cpu", 1, True)
    tokens, changed, change = by_hand(pipe64, PROMPT, text[0])
    assert 0 < len(tokens) < 7
    last = round(20 / 50 * 10 / (1 + math.exp(-5 * (10 * change - 5.333))))
    seen = []
    pipe64.unet.down_blocks[0].attentions[0].register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    with difffast.patched(pipe64, "exact", steering=difffast.SafeGuard(CONCEPTS)) as report:
        guarded = latents(pipe64, PROMPT)
    assert report.trace.tokens == (tokens,)
    assert report.trace.steps == (last + 1,)
    for step, each in enumerate(seen):
        expected = changed if step <= last else text[0]
        assert (each - torch.stack([negative[0], expected])).abs().max() <= 1e-12
    assert largest(guarded, latents(pipe64, PROMPT)) > 1e-6


def test_how_long_the_changed_text_is_used():
    from difffast.steering.safe_guard import Filtered

    steps = [Filtered(torch.zeros(1), (1,), change).last_step(50) for change in (0.0, 0.5333, 0.6, 2.0)]
    assert steps == [0, 5, 10, 10]
    assert Filtered(torch.zeros(1), (1,), 2.0).last_step(20) == 4


def test_tokens_are_chosen_against_the_mean_of_the_others():
    assert choose_tokens(torch.tensor([1.0, 1.0, 1.2])) == [2]
    assert choose_tokens(torch.tensor([1.0, 1.0])) == []
    assert choose_tokens(torch.tensor([1.0])) == [0]


def test_several_prompts_images_and_two_encoders():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent", "num_images_per_prompt": 2}
    with difffast.patched(pipe, "exact", steering=difffast.SafeGuard(CONCEPTS)) as report:
        found = pipe([PROMPT, "a"], generator=torch.Generator().manual_seed(0), **given).images
    assert len(report.trace.tokens) == len(report.trace.steps) == 2
    assert report.trace.tokens[1] == (1,)
    plain = pipe([PROMPT, "a"], generator=torch.Generator().manual_seed(0), **given).images
    assert found.shape == plain.shape
    assert not torch.equal(found, plain)


def test_each_text_encoders_prompt_is_guarded_with_its_own_concepts():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.set_progress_bar_config(disable=True)
    texts, second = [], "blood by a wolf"
    pipe.unet.down_blocks[1].attentions[0].register_forward_pre_hook(
        lambda _m, _a, given: texts.append(given["encoder_hidden_states"][-1]), with_kwargs=True
    )
    with difffast.patched(pipe, "exact", steering=difffast.SafeGuard(CONCEPTS)) as report:
        for given in ((PROMPT, None), (second, None), (PROMPT, second)):
            pipe(*given, num_inference_steps=1, height=32, width=32, output_type="latent")
    stock = pipe.encode_prompt(PROMPT, second, do_classifier_free_guidance=False)[0][0]
    width = pipe.text_encoder.config.hidden_size
    first, other, both = texts
    assert torch.equal(both[:, :width], first[:, :width])
    assert torch.equal(both[:, width:], other[:, width:])
    assert not torch.equal(both[:, width:], stock[:, width:])
    assert len(report.trace.tokens[0]) > 0


def test_what_cannot_be_guarded_is_said(pipe):
    with pytest.raises(ValueError, match="at least one word"):
        difffast.SafeGuard([])
    with pytest.raises(TypeError, match="steering must be a method such as"):
        difffast.patch(pipe, steering="blood")
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    with (
        difffast.patched(pipe, "exact", steering=difffast.SafeGuard(CONCEPTS)),
        pytest.warns(UserWarning, match="has not been through"),
    ):
        pipe(prompt_embeds=embeds, num_inference_steps=2, output_type="latent")
    pipe.text_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="CLIP's text encoders, got Linear"):
        difffast.patch(pipe, steering=difffast.SafeGuard(CONCEPTS))
