"""Several pipelines at once: DeepFloyd IF's two stages and an upscaler."""

import pytest
import torch
from if_zoo import deepfloyd, run, upscale
from sampling import largest, picture
from zoo import ROWS, Inputs

from difffast import EncoderPropagation, patch, patched, unpatch
from difffast.plan import scale_published_key_steps
from difffast.surgery.subclass import is_swapped


@pytest.fixture
def stages():
    pipes = [deepfloyd("IFPipeline")(), deepfloyd("IFSuperResolutionPipeline")()]
    pipes.append(ROWS["StableDiffusionUpscalePipeline"].build())
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def cascade(stages, steps):
    """The three stages in turn: the second takes the first's picture, the third another of its size."""
    one, two, three = stages
    small = run(one, Inputs(steps=steps[0]))
    large = upscale(two, Inputs(size=(64, 64), steps=steps[1]), image=small)
    final = three(
        "a red circle",
        image=[picture(8)],
        num_inference_steps=steps[2],
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return small, large, final


def test_a_cascade(stages):
    steps = (40, 50, 15)
    stock = cascade(stages, steps)
    reports = patch(stages, "faster-diffusion")
    fast = cascade(stages, steps)
    for report, kind, count, ours, theirs in zip(
        reports, ("if-1", "if-2", "upscaler"), steps, fast, stock, strict=True
    ):
        assert report.last_run.key == len(scale_published_key_steps(kind, count)) < count
        assert ours.shape == theirs.shape
        assert largest(ours, theirs) > 1e-4
    assert unpatch(stages)
    assert not unpatch(stages)
    assert all(torch.equal(a, b) for a, b in zip(cascade(stages, steps), stock, strict=True))


def test_all_or_nothing(stages):
    patch(stages[0], "turbo")
    with pytest.raises(TypeError, match=r"must be a diffusers.DiffusionPipeline, got str"):
        patch([*stages, "no pipeline"])
    assert not any(is_swapped(pipe.unet) for pipe in stages[1:])
    assert is_swapped(stages[0].unet)
    with patched(stages, propagation=EncoderPropagation(key_steps=2)) as reports:
        assert [report.pipeline for report in reports] == [type(pipe).__name__ for pipe in stages]
    assert [is_swapped(pipe.unet) for pipe in stages] == [True, False, False]
