"""Loops of one's own that go over one schedule again and again: weights written in between past PyTorch's counters."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from sampling import distance

from difffast import patched
from difffast.sampling import passes
from difffast.sampling.passes import Passes

STEPS = 3
LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "conv2", "to_k", "to_q"])


def latents(seed=0):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def average(unet):
    """Copy averaged weights into the UNet, as evaluations do while a model is trained."""
    averaged, generator = EMAModel(unet.parameters()), torch.Generator().manual_seed(3)
    for weight in averaged.shadow_params:
        weight.add_(0.3 * weight.abs().mean() * torch.randn(weight.shape, generator=generator))
    averaged.copy_to(unet.parameters())


def fuse(unet):
    unet.fuse_lora(lora_scale=2.0)


def whole(pipe, text, steps):
    x = latents()
    for t in pipe.scheduler.timesteps[:steps]:
        x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
    return x


LOOPS = {
    "to the end": lambda pipe, text: whole(pipe, text, STEPS),
    "left before the end": lambda pipe, text: whole(pipe, text, STEPS - 1),
    "a single step": lambda pipe, text: pipe.unet(latents(), pipe.scheduler.timesteps[1], text).sample,
}


@torch.no_grad()
def go_over(pipe, loop, change):
    """What a loop gives before and after the weights change."""
    text = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(STEPS)  # once
    before = loop(pipe, text)
    change(pipe.unet)
    return before, loop(pipe, text), loop(pipe, text)


@pytest.mark.parametrize("change", [average, fuse])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_pass_has_the_weights_of_its_time(pipe, loop, change):
    if change is fuse:
        pipe.unet.add_adapter(LORA)
    stock = go_over(copy.deepcopy(pipe), LOOPS[loop], change)
    with patched(pipe, "exact"):
        ours = go_over(pipe, LOOPS[loop], change)
    assert distance(stock[1], stock[0]) > 0.01
    assert max(map(distance, ours, stock)) <= 1e-5


def test_which_calls_begin_another_pass(monkeypatch):
    negative, positive = torch.zeros(1), torch.ones(1)

    def followed(calls):
        watched = Passes()
        return [watched.follow(*call, merges=0) for call in calls]

    two_texts = [(step, text) for step in range(2) for text in (negative, positive)]
    assert followed(two_texts) == [False] * 4, "guidance by two calls is one pass"
    assert followed([*two_texts, *two_texts]) == [False] * 4 + [True] + [False] * 3
    assert followed([(1, positive), (1, positive), (1, negative)]) == [False, True, False]
    assert followed([(0, None), (2, None), (1, None)]) == [False, False, True]
    monkeypatch.setattr(passes, "find_pipeline_call", object)
    assert followed([(1, positive)] * 3) == [False] * 3, "a panorama's views, in its pipeline's call"
