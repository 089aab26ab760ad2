"""Pipelines that share a VAE or text encoders: each runs them by its own options, and one that is not patched stock."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

from difffast import patch, patched, unpatch


def image(pipe, **options):
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt", **options}
    return pipe("a red circle", **options).images


@pytest.fixture
def pair(pipe):
    """Two pipelines that have all in common but UNet and scheduler."""
    parts = {**pipe.components, "unet": copy.deepcopy(pipe.unet), "scheduler": copy.deepcopy(pipe.scheduler)}
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return pipe, other


def test_a_neighbour_that_is_not_patched_runs_stock(pair):
    one, other = pair
    stock = image(other)
    with patched(one, "exact"):
        assert torch.equal(image(other), stock)
        inside = []

        def run_other(*_):
            inside.append(image(other))
            return {}

        image(one, callback_on_step_end=run_other)
        assert all(torch.equal(each, stock) for each in inside)
        assert len(inside) == 2
        assert not torch.equal(image(one), stock), "the patched one has its norms fused"


@pytest.mark.parametrize("first", ["fused", "unfused"])
def test_each_of_two_patched_neighbours_has_its_own_options(pair, first):
    one, other = pair
    stock = image(other)
    with patched(one, "exact") as report:
        fused = image(one)
        assert report.last_run.total == 2
    unpatch(one)
    for pipe in pair if first == "fused" else reversed(pair):
        patch(pipe, "exact", fused=pipe is one)
    assert torch.equal(image(other), stock)
    assert torch.equal(image(one), fused)
    unpatch(one)
    assert torch.equal(image(other), stock)


def test_one_that_shares_unet_and_scheduler_runs_alike(pipe):
    twin = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    with patched(pipe, "exact"):
        fused = image(pipe)
        assert torch.equal(image(twin), fused)
        latent = image(pipe, output_type="latent")
        with torch.no_grad():
            decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
        assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), fused), "a loop of one's own runs by what was asked for"
