"""Semantic binding in stock pipelines, against the method written out (binding_by_hand.py)."""

import copy
import pickle
import threading
import warnings

import binding_by_hand
import pytest
import torch
from binding_by_hand import Things
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from sampling import largest, latents, mask, picture, scheduler

from difffast import EncoderPropagation, SemanticBinding, collect_maps, patch, patched, unpatch
from difffast.guidance import run as binding_run
from difffast.guidance.freezing import frozen
from difffast.models import tiny_pipeline
from difffast.swap import is_swapped

PROMPT = "a [red ox] by a [elk in fog]"
# One token a letter: a red ox by a elk in fog.
THINGS = Things(
    "a red ox by a elk in fog",
    (((5, 6), (2, 3, 4)), ((10, 11, 12), (13, 14, 15, 16, 17))),
    ("a red ox", "a elk in fog"),
    "an ox by an elk",
)
LAYERS = tuple(f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)) + tuple(
    f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1, 2)
)
#: Of what binding changes in the latents.
MOTION = 1e-10
STEPS = 10
OPTIONS = {"step_size": 3.0, "bind_step_size": 30.0}
#: No other loss than the entropy, and no early end.
FIXED = {"losses": {"entropy": 1}, "thresholds": (), "iterations": 2}


def binding(**options):
    return SemanticBinding(**{"bind_steps": 2, "focus_steps": 3, "replace_step": 1, **OPTIONS, **FIXED, **options})


def run(pipe, config, prompt=PROMPT, preset="exact", **options):
    with patched(pipe, preset, binding=config) as report:
        return latents(pipe, prompt, steps=STEPS, **options), report


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_a_run_is_the_method_written_out(pipe64, mode):
    pipe64.scheduler = scheduler("DDIM")
    ours, report = run(pipe64, binding(mode=mode))
    expected, focus, bind = binding_by_hand.sample(
        pipe64, THINGS, mode=mode, steps=STEPS, bind=2, focus=3, iterations=2, replace=1, layers=LAYERS, **OPTIONS
    )
    plain = latents(pipe64, THINGS.text, steps=STEPS)
    assert largest(ours, expected) <= MOTION * largest(expected, plain)
    assert largest(expected, plain) > 1e-3
    steps = report.trace.steps
    assert {step.outcome for step in steps} == {"iterations"}
    for kind, losses in (("focus", focus), ("bind", bind)):
        found = [step.losses for step in steps if step.kind == kind]
        assert largest(torch.tensor(found), torch.tensor(losses)) <= 1e-10
    assert focus[0][0] > focus[0][1]
    assert bind[0][0] > bind[0][1]


@pytest.mark.parametrize("name", ["Euler", "DPM++ 2M"])
def test_schedulers_step_from_the_moved_latents(pipe64, name):
    pipe64.scheduler = scheduler(name)
    expected, _, _ = binding_by_hand.sample(
        pipe64, THINGS, mode="paper", steps=STEPS, bind=1, focus=2, iterations=2, replace=0, layers=LAYERS, **OPTIONS
    )
    ours, _ = run(pipe64, binding(bind_steps=1, focus_steps=2, replace_step=0))
    plain = latents(pipe64, THINGS.text, steps=STEPS)
    assert largest(ours, expected) <= MOTION * largest(expected, plain)
