"""Autocast that is switched on or off in the middle of a run: nothing that was made under the other dtype is used."""

import contextlib
from collections import Counter

import pytest
import torch
from sampling import distance

from difffast import EncoderPropagation, OutputForecast, patched
from difffast.layers.text_kv import TextKV

STEPS = 8


@torch.no_grad()
def switched(pipe, on):
    """A loop of one's own, where autocast is on at some steps."""
    text = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(pipe.scheduler.timesteps):
        with torch.autocast("cpu", torch.bfloat16) if on(i) else contextlib.nullcontext():
            output = pipe.unet(x, t, encoder_hidden_states=text).sample
        x = pipe.scheduler.step(output.float(), t, x).prev_sample
    return x


@pytest.mark.parametrize("first", [True, False], ids=["switched off", "switched on"])
def test_it_makes_a_key_step(pipe, first):
    stock = switched(pipe, lambda step: (step < 5) is first)
    with patched(pipe, "exact"):
        assert distance(switched(pipe, lambda step: (step < 5) is first), stock) < 0.02
    for propagation in (EncoderPropagation(key_steps=4), OutputForecast(key_steps=(0, 3, 7))):
        with patched(pipe, propagation=propagation) as report:
            switched(pipe, lambda step: (step < 6) is first)
        assert "key step at 6: autocast's dtype changed" in report.last_run.reasons


def test_keys_and_values_of_a_text_are_of_its_dtype():
    projection, text, state = torch.nn.Linear(4, 4), torch.ones(1, 2, 4), [0]
    kv = TextKV(text, Counter())

    def project(layer, text):
        return layer(text), layer(text)

    def read():
        return kv.get(projection, state, project)[0], kv.project(projection).text

    with torch.no_grad():
        plain = read()
        with torch.autocast("cpu", torch.bfloat16):
            assert [each.dtype for each in read()] == [torch.bfloat16] * 2
        assert all(map(torch.equal, read(), plain))
