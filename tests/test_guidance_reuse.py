"""Guidance's unconditional half made from the conditional one: what runs, what comes out, where it does not apply."""

import pytest
import torch
from sampling import largest, latents
from tolerances import EXACT_FLOAT32, LATENTS_FLOAT64
from unet_oracle import decode, encode
from watching import watching

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, Plan, collect_maps, patch, patched
from difffast.engines import programs
from difffast.presets import PRESETS, Preset
from difffast.unet.outer_layers import run_recording, run_reuse

STEPS = 12
EXACT = EncoderPropagation(key_steps=1)
EVERY_THIRD = EncoderPropagation(key_steps=3, max_parallel=3)


def run(pipe, **options):
    return latents(pipe, **{"steps": STEPS, **options})


@torch.no_grad()
def by_hand(pipe, noise):
    """A loop of our own; ``noise(order, t, x, text)`` gives both halves' predictions [2, ...]."""
    scheduler, text = pipe.scheduler, torch.cat(pipe.encode_prompt("a red circle", "cpu", 1, True)[::-1])
    scheduler.set_timesteps(STEPS)
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for order, t in enumerate(scheduler.timesteps):
        negative, positive = noise(order, t, x, text).chunk(2)
        x = scheduler.step(negative + 7.5 * (positive - negative), t, x).prev_sample
    return x


def both(positive, difference):
    return torch.cat([positive - difference, positive])


def whole(pipe, interval):
    """Every step in full, on both halves at every ``interval``-th."""
    held = {}

    def noise(order, t, x, text):
        if order % interval:
            return both(pipe.unet(x, t, text[1:]).sample, held["difference"])
        out = pipe.unet(torch.cat([x] * 2), t, text).sample
        held["difference"] = out[1:] - out[:1]
        return out

    return noise


def propagated(pipe, keys, interval):
    """The encoder at every ``keys``-th step, on both halves at every ``interval``-th."""
    held = {}

    def noise(order, t, x, text):
        if order % keys == 0:
            rows = slice(None) if order % interval == 0 else slice(1, None)
            held["skips"], held["mid"] = encode(pipe.unet, torch.cat([x] * 2)[rows], t, text[rows])
        if order % interval == 0:
            out = decode(pipe.unet, held["skips"], held["mid"], t, text)
            held["difference"] = out[1:] - out[:1]
            return out
        skips = [skip[-1:] for skip in held["skips"]]
        return both(decode(pipe.unet, skips, held["mid"][-1:], t, text[1:]), held["difference"])

    return noise


def reused(pipe, keys, interval):
    """The whole UNet at every ``keys``-th step, on both halves at every ``interval``-th."""
    held = {}

    def noise(order, t, x, text):
        rows = slice(None) if order % interval == 0 else slice(1, None)
        call = {"sample": torch.cat([x] * 2)[rows], "timestep": t, "encoder_hidden_states": text[rows]}
        if order % keys == 0:
            out, held["deep"] = run_recording(pipe.unet, call, 0)
        else:
            out = run_reuse(pipe.unet, call, [held["deep"][-1:]], torch.ones(1), 0)
        if order % interval:
            return both(out, held["difference"])
        held["difference"] = out[1:] - out[:1]
        return out

    return noise


@pytest.mark.parametrize(
    ("config", "interval", "written"),
    [
        (EXACT, 2, lambda pipe: whole(pipe, 2)),
        (EXACT, 3, lambda pipe: whole(pipe, 3)),
        (EVERY_THIRD, 3, lambda pipe: propagated(pipe, 3, 3)),
        (EVERY_THIRD, 6, lambda pipe: propagated(pipe, 3, 6)),
        (EncoderPropagation(key_steps=3, parallel=False), 6, lambda pipe: propagated(pipe, 3, 6)),
        (FeatureReuse(3), 3, lambda pipe: reused(pipe, 3, 3)),
        (FeatureReuse(3), 6, lambda pipe: reused(pipe, 3, 6)),
    ],
    ids=lambda value: str(value) if not callable(value) else "",
)
def test_it_is_the_method_written_out(pipe64, config, interval, written):
    expected = by_hand(pipe64, written(pipe64))
    stock = run(pipe64)
    rows = []
    with (
        patched(pipe64, propagation=config, cfg=CfgReuse(interval)) as report,
        watching(lambda _module, out: rows.append(len(out)), pipe64.unet.conv_out),
    ):
        ours = run(pipe64)
    assert largest(ours, expected) <= LATENTS_FLOAT64
    assert largest(ours, stock) > 1e-4
    full = len(range(0, STEPS, interval))
    assert report.last_run.halves == STEPS - full
    assert sum(rows) == STEPS + full, "the conditional half at every step, the unconditional one at full steps"
    assert report.last_run.forced == 0
    assert not report.last_run.reasons


@pytest.mark.parametrize("options", [{"num_images_per_prompt": 2}, {"prompt": ["a cat", "two dogs"]}], ids=str)
def test_batches_and_text_keys(pipe64, options):
    images = []
    for parallel in (True, False):
        config = EncoderPropagation(key_steps=3, max_parallel=3, parallel=parallel)
        with patched(pipe64, propagation=config, cfg=CfgReuse(6)) as report:
            images.append(run(pipe64, **options))
    assert largest(*images) <= LATENTS_FLOAT64
    layers = len([name for name, _ in pipe64.unet.named_modules() if name.endswith("attn2")])
    assert report.last_run.text_kv["computed"] == 2 * layers, "once a prompt for both halves, and once for one"


def test_after_a_forced_key_step_both_halves_run_to_the_next(pipe64):
    def edit(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 2} if step == 3 else {}

    images = []
    for parallel in (True, False):
        config = EncoderPropagation(key_steps=3, max_parallel=3, parallel=parallel)
        with patched(pipe64, propagation=config, cfg=CfgReuse(6)) as report:
            images.append(run(pipe64, callback_on_step_end=edit, callback_on_step_end_tensor_inputs=["prompt_embeds"]))
        assert report.last_run.forced == 1
        # Steps 1 to 3 ran one half; 4 and 5, of the new prompt, both; 6 is full; 7 to 11 one.
        assert report.last_run.halves == 3 + 5
    assert largest(*images) <= LATENTS_FLOAT64


def test_guidance_that_is_off(pipe64):
    with patched(pipe64, "exact"):
        expected = run(pipe64, guidance_scale=1.0)
    with patched(pipe64, "exact", cfg=CfgReuse(2)) as report:
        assert torch.equal(run(pipe64, guidance_scale=1.0), expected)
    assert report.last_run.halves == 0
    assert report.last_run.reasons == ["guidance's halves run together: guidance is off"]

    def off(pipe, step, timestep, tensors):
        if step != 4:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    options = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with patched(pipe64, propagation=EVERY_THIRD, cfg=CfgReuse(3)) as report:
        assert run(pipe64, **options).isfinite().all()
    assert report.last_run.halves == 3  # steps 1, 2 and 4


def test_maps_wanted_from_the_middle_of_a_run_on(pipe):
    """Halves that are decoded already come out as halves."""
    begun = []

    def begin(pipe, step, timestep, tensors):
        if step == 4:
            begun.append(collect_maps(pipe))
            begun[-1].__enter__()
        return tensors

    with patched(pipe, propagation=EVERY_THIRD, cfg=CfgReuse(3)) as report:
        assert run(pipe, callback_on_step_end=begin).shape[0] == 1
        begun[-1].__exit__(None, None, None)
    assert report.last_run.halves == 4  # steps 1, 2, 4 and 5, the last of which was waiting


def test_maps_need_both_halves(pipe):
    with patched(pipe, "exact", cfg=CfgReuse(2)) as report, collect_maps(pipe) as maps:
        run(pipe)
    assert maps.mean(maps.layers[0], rows="all").shape[0] == 2
    assert report.last_run.halves == 0


@pytest.mark.slow
def test_compiled(pipe, monkeypatch):
    monkeypatch.setattr(programs, "BACKEND", "eager")
    with patched(pipe, propagation=FeatureReuse(3), cfg=CfgReuse(6)):
        expected = run(pipe)
    with patched(pipe, propagation=FeatureReuse(3), cfg=CfgReuse(6), compile=True) as report:
        assert largest(run(pipe), expected) <= EXACT_FLOAT32
    assert not report.last_run.reasons
    assert report.last_run.halves == 10


@pytest.mark.parametrize("order", [1, 2])
def test_extrapolated_features(pipe64, order):
    """Halves are extrapolated from halves, and from the conditional rows of both."""
    with patched(pipe64, propagation=FeatureReuse(3, extrapolate=order), cfg=CfgReuse(6)) as report:
        assert run(pipe64).isfinite().all()
    assert (report.last_run.key, report.last_run.reused, report.last_run.halves) == (4, 8, 10)


def test_plans():
    plan = CfgReuse(6, start=0.25).apply(FeatureReuse(3).plan(16))
    assert plan.halves == (4, 5, 6, 7, 8, 10, 11, 12, 13, 14)
    assert Plan.from_json(plan.to_json()) == plan
    assert "conditional half" in str(plan)
    assert plan.cut(10).halves == (4, 5, 6, 7, 8)
    assert plan.add_full_steps([0, 4]).halves == (5, 6, 7, 8, 10, 11, 12, 13, 14)
    assert CfgReuse(0.5).apply(EXACT.plan(10)).halves == (1, 2, 3, 4, 6, 7, 8, 9)
    ahead = CfgReuse(2).apply(EVERY_THIRD.plan(7))
    assert [tuple(ahead.batch(order)) for order in (0, 1, 3, 4, 6)] == [(0,), (1, 2), (3,), (4, 5), (6,)]


def test_bad_plans_and_values_are_refused(pipe):
    with pytest.raises(ValueError, match="step 4 needs both halves of key step 3, which runs one"):
        Plan(total=6, key_steps=(0, 3), max_batch=1, halves=(3, 5))
    with pytest.raises(ValueError, match="halves must lie in 1"):
        Plan(total=6, key_steps=(0, 3), max_batch=1, halves=(0,))
    for options, error in (({"interval": 0}, ValueError), ({"interval": "2"}, TypeError), ({"start": 2}, ValueError)):
        with pytest.raises(error):
            CfgReuse(**options)
    with pytest.raises(TypeError, match=r"cfg must be a difffast.CfgReuse, got int"):
        patch(pipe, cfg=2)


def test_a_preset_goes_without_where_it_cannot(pipe, monkeypatch):
    monkeypatch.setitem(PRESETS, "exact", Preset(EXACT, cfg=CfgReuse(2)))
    with patched(pipe, "exact") as report:
        run(pipe)
    assert report.last_run.halves == 6
    monkeypatch.delattr(type(pipe), "do_classifier_free_guidance")
    with patched(pipe, "exact") as report:
        assert any("does not tell whether a run is guided" in note for note in report.notes)
    with pytest.raises(ValueError, match="guidance cannot be reused with StableDiffusionPipeline"):
        patch(pipe, "exact", cfg=CfgReuse(2))
