"""ControlNet belongs to the encoder: it runs at key steps, and what changes its outputs makes a key step."""

import copy

import pytest
import torch
import zoo
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from sampling import largest, latents, picture
from tolerances import LATENTS_FLOAT64
from unet_oracle import decode, encode

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, patched, unpatch
from difffast.surgery.subclass import is_swapped

KEYS = EncoderPropagation(key_steps=4)
STEP_BY_STEP = EncoderPropagation(key_steps=4, parallel=False)


@pytest.fixture(scope="module")
def _built():
    pipe = zoo.ROWS["StableDiffusionControlNetPipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.float64)


@pytest.fixture
def pipe(_built):
    """A ControlNet pipeline in float64."""
    return copy.deepcopy(_built)


def run(pipe, **options):
    return latents(pipe, image=picture(), height=32, width=32, **{"steps": 12, **options})


def calls_of(module):
    """A list that grows with every call of the module's forward."""
    calls = []
    module.conv_in.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"propagation": KEYS},
        {"propagation": KEYS, "controlnet": "key steps"},
        {"propagation": STEP_BY_STEP},
        {"propagation": FeatureReuse(4), "controlnet": "key steps"},
    ],
    ids=["parallel", "asked for", "steps", "reuse"],
)
def test_it_runs_at_key_steps_only(pipe, options):
    calls = calls_of(pipe.controlnet)
    with patched(pipe, **options) as report:
        run(pipe)
    assert "runs at key steps" in str(report)
    assert len(calls) == 3
    assert report.last_run.controlnet == {"computed": 3, "reused": 9}
    assert "ControlNet computed 3 times, reused 9 times" in str(report.last_run)


def deepcache(pipe, branch):
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()
    try:
        return run(pipe)
    finally:
        helper.disable()


@pytest.mark.parametrize("branch", [0, 1, 3])
def test_under_feature_reuse_it_runs_at_every_step_as_in_deepcache(pipe, branch):
    """Its current residuals are added to the skips that are made anew; those of the key step are further from stock."""
    config, stock, expected = FeatureReuse(3, branch=branch), run(pipe), deepcache(pipe, branch)
    with patched(pipe, propagation=config, fused=False) as report:
        ours = run(pipe)
    assert torch.equal(ours, expected)
    assert report.last_run.controlnet == {"computed": 12}
    assert (report.last_run.key, report.last_run.reused, report.last_run.forced) == (4, 8, 0)
    assert "runs at every step" in str(report)
    with patched(pipe, propagation=config, fused=False, controlnet="key steps"):
        older = run(pipe)
    assert largest(older, expected) > 1e-4
    assert (older - stock).norm() > 1.01 * (ours - stock).norm()


def test_a_cadence_that_cannot_be_is_refused(pipe):
    with pytest.raises(ValueError, match="controlnet must be one of 'every step', 'key steps', None, got 'always'"):
        patch(pipe, controlnet="always")
    with pytest.raises(ValueError, match=r"needs steps that see the current latents: .* got EncoderPropagation"):
        patch(pipe, propagation=EncoderPropagation(key_steps=3), controlnet="every step")
    patch(pipe, "exact", controlnet="every step")
    plain = StableDiffusionPipeline(
        **{name: part for name, part in pipe.components.items() if name != "controlnet"}, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="'key steps' needs a pipeline with a ControlNet, and StableDiffusionPipe"):
        patch(plain, "turbo", controlnet="key steps")


def test_is_the_published_method(pipe):
    """Residuals of the key step enter all steps of its segment: a loop of our own, by hand-written halves."""
    unet, net, scheduler = pipe.unet, pipe.controlnet, pipe.scheduler
    with torch.no_grad():
        text = torch.cat(pipe.encode_prompt("a red circle", "cpu", 1, True)[::-1])
        image = pipe.prepare_image(picture(), 32, 32, 1, 1, "cpu", torch.float64, True)
        scheduler.set_timesteps(12)
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for order, t in enumerate(scheduler.timesteps):
            if order % 4 == 0:
                both = torch.cat([x] * 2)
                down, mid = net(both, t, text, image, return_dict=False)
                skips, bottleneck = encode(unet, both, t, text)
                skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
            negative, positive = decode(unet, skips, bottleneck + mid, t, text).chunk(2)
            x = scheduler.step(negative + 7.5 * (positive - negative), t, x).prev_sample
    with patched(pipe, propagation=KEYS):
        assert largest(run(pipe), x) <= LATENTS_FLOAT64


@pytest.mark.parametrize(
    "options",
    [
        {"control_guidance_end": 0.5},
        {"control_guidance_start": 0.4},
        {"control_guidance_start": 0.15, "control_guidance_end": 0.8, "guess_mode": True},
    ],
    ids=str,
)
def test_where_it_starts_and_ends_there_are_key_steps(pipe, options):
    with patched(pipe, propagation=STEP_BY_STEP):
        slow = run(pipe, **options)
    with patched(pipe, propagation=KEYS) as report:
        fast = run(pipe, **options)
    assert largest(fast, slow) <= LATENTS_FLOAT64
    stats = report.last_run
    assert stats.forced == sum("ControlNet's conditioning_scale changed" in reason for reason in stats.reasons) > 0
    assert stats.key == 3 + stats.forced
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        assert torch.equal(run(pipe, **options), run_stock(pipe, **options))


def run_stock(pipe, **options):
    unpatch(pipe)
    return run(pipe, **options)


def test_a_prompt_edited_halfway_reaches_both(pipe):
    def edit(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 2} if step == 5 else {}

    calls = calls_of(pipe.controlnet)
    with patched(pipe, propagation=KEYS) as report:
        run(pipe, callback_on_step_end=edit, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert report.last_run.key == len(calls) == 4
    assert report.last_run.forced == 1


def test_invalidate_and_interrupt(pipe):
    with patched(pipe, propagation=KEYS) as report:
        expected = run(pipe)
        calls = calls_of(pipe.controlnet)
        run(pipe, callback_on_step_end=lambda p, step, t, x: (step == 5 and report.invalidate(), x)[1])
        assert len(calls) == report.last_run.key == 4

        def interrupt(pipe, step, timestep, tensors):
            pipe._interrupt = step >= 5
            return tensors

        run(pipe, prompt="something else", callback_on_step_end=interrupt)
        assert torch.equal(run(pipe), expected)


def test_a_shared_controlnet(pipe):
    """Two pipelines with one ControlNet; the last one unpatched gives it its class back."""
    other = StableDiffusionControlNetPipeline(
        **{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    stock = run(other)
    patch(pipe, propagation=KEYS)
    with pytest.warns(UserWarning, match="this UNet call runs unpatched"):
        assert torch.equal(run(other), stock)
    patch(other, propagation=KEYS)
    fast = run(other)
    unpatch(pipe)
    assert torch.equal(run(other), fast)
    assert is_swapped(other.controlnet)
    unpatch(other)
    assert not is_swapped(other.controlnet)
    assert torch.equal(run(other), stock)


def test_another_controlnet_after_patching(pipe):
    """Its residuals run stock, and unpatch gives the first its class back."""
    first, second = pipe.controlnet, copy.deepcopy(pipe.controlnet)
    stock = run(pipe)
    patch(pipe, propagation=KEYS)
    pipe.controlnet = second
    with pytest.warns(UserWarning, match="not of the patched pipeline's own ControlNet"):
        assert torch.equal(run(pipe), stock)
    assert is_swapped(first)
    unpatch(pipe)
    assert not is_swapped(first)
    assert not is_swapped(second)


def test_a_pipeline_without_it_shares_the_unet(pipe):
    plain = StableDiffusionPipeline(
        **{name: part for name, part in pipe.components.items() if name != "controlnet"}, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    with patched(plain, propagation=KEYS), patched(pipe, propagation=KEYS):
        first, under = latents(plain, steps=12), run(pipe)
        assert torch.equal(latents(plain, steps=12), first)
        assert torch.equal(run(pipe), under)
    assert largest(first, under) > 1e-3


@pytest.mark.parametrize("cfg", [None, CfgReuse(1)])
def test_under_freeu_every_step_is_stock(pipe, cfg):
    """Nothing of a step that runs stock is kept: neither ControlNet's residuals nor one half of the batch."""
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    stock = run(pipe)
    with (
        patched(pipe, propagation=FeatureReuse(4), cfg=cfg, fused=False) as report,
        pytest.warns(UserWarning, match="FreeU changes the skips"),
    ):
        assert torch.equal(run(pipe), stock)
    assert report.last_run.controlnet == {"computed": 12}
    assert report.last_run.halves == 0


def test_two_pipelines_that_share_it_and_the_scheduler(pipe):
    """The time steps tell nothing of which pipeline calls it; the one that is running does."""
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.2)
    other.controlnet, other.scheduler = pipe.controlnet, pipe.scheduler
    pipes = pipe, other
    alone = []
    for each in pipes:
        with patched(each, propagation=KEYS):
            alone.append(run(each))
    reports = [patch(each, propagation=KEYS) for each in pipes]
    for _ in range(2):
        for each, report, expected in zip(pipes, reports, alone, strict=True):
            assert torch.equal(run(each), expected)
            assert report.last_run.controlnet == {"computed": 3, "reused": 9}
            assert not report.last_run.reasons
