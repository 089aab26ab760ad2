"""The benchmarks' own pipelines, workloads and providers: each passes its gate, and leaves no trace."""

import dataclasses
import importlib
import json
import re
import sys

import peers
import pipelines
import providers
import pytest
import registry
import torch
from cases import case
from peak_memory import PeakMemory
from registry import Gate
from sampling import latents
from session import complaints, measure
from workloads import Images, Stage

import difffast
from difffast.surgery.subclass import is_swapped

SUITES = ("bench_unet", "bench_pipelines", "bench_guidance", "bench_memory", "bench_full_size")
STEPS = 8


# The real providers, on real pipelines.


@pytest.fixture
def images(pipe):
    return Images([Stage(pipe, {"prompt": "a red circle"})], STEPS, latent=True)


def real(images, *others):
    return case(providers.stock(), *others, build=lambda: images, rounds=(0, 0))


def test_every_provider_of_today_passes_its_gate_and_leaves_no_trace(images):
    pipe = images.stages[0].pipe
    before = latents(pipe, steps=STEPS)
    everyone = (
        *providers.presets(),
        providers.published_key_steps(),
        *providers.competitors(),
        *providers.savings(),
        *providers.exact_savings(),
        *(providers.reuse(interval, branch) for interval, branch in ((3, 0), (5, 1))),
        providers.stock_channels_last(),
    )
    record = measure(real(images, *everyone), 1e9)
    assert not record["absent"]
    changed = {name for name, gate in record["gate"].items() if gate["error_to_baseline"] > 1e-4}
    # balanced and turbo approximate from 12 steps on; everyone else who claims to approximate does.
    reuse = {"difffast, reuse 3, branch 0", "difffast, reuse 5, branch 1"}
    plain = {"propagation alone, step by step", "propagation alone, parallel", "the same with shared skips"}
    approximate = {"difffast faster-diffusion", "guidance reuse alone", *plain, *reuse}
    assert changed == {*approximate, *(provider.name for provider in providers.competitors())}
    assert not is_swapped(pipe.unet)
    assert torch.equal(latents(pipe, steps=STEPS), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_the_compiled_baseline_is_compiled_and_exact(images):
    record = measure(dataclasses.replace(real(images, providers.stock_compiled()), rounds=(2, 2)), 1e9)
    assert set(record["seconds"]) == {"stock", "stock compiled"}
    assert 0 < record["gate"]["stock compiled"]["error"] < 1e-5
    assert not hasattr(images.stages[0].pipe.unet, "_orig_mod")


class FromMemory:
    """In place of a UNet: answers every second step with what it said before."""

    def __init__(self, unet):
        self._unet, self._calls, self._said = unet, 0, None

    def __call__(self, *args, **kwargs):
        if self._calls % 2 == 0:
            self._said = self._unet(*args, **kwargs)
        self._calls += 1
        return self._said

    def __getattr__(self, name):
        return getattr(self._unet, name)


@pytest.mark.parametrize("gate", [Gate(), Gate(tolerance=registry.APPROXIMATION)], ids=["exact", "approximation"])
def test_skipping_every_second_step_is_caught(images, gate):
    def skip(mine, stack):
        pipe = mine.stages[0].pipe
        vars(pipe)["unet"] = FromMemory(pipe.unet)

    record = measure(real(images, providers.on_images("cheat", "difffast", skip, gate)), 1e9)
    assert record["absent"]["cheat"]["status"] == "failed"
    # As an approximation it is near enough: only the work that it did gives it away.
    reason = "wrong" if gate.tolerance is None else f"skips work: {STEPS} outputs computed, {2 * STEPS} due"
    assert reason in record["absent"]["cheat"]["reason"]


def test_pipelines_that_difffast_refuses_are_still_measured(monkeypatch):
    monkeypatch.setattr("difffast.support.PIPELINES", {})
    sdxl = pipelines.stages("SDXL", full=False, batch=1, device="cpu", dtype=torch.float32)
    record = measure(real(Images(sdxl, 3), *providers.presets(), providers.deepcache(3, 1)), 1e9)
    reasons = {name: (absent["status"], absent["reason"]) for name, absent in record["absent"].items()}
    assert set(reasons) == {"difffast turbo", "difffast balanced", "balanced, stock layers"}
    for status, reason in reasons.values():
        assert status == "refused"
        assert reason.startswith("StableDiffusionXLPipeline can only have what is exact")
    assert not list(complaints(record))
    assert record["gate"]["DeepCache 3, branch 1"]["error_to_baseline"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")  # IF hands on -1 to 1
@pytest.mark.parametrize("name", pipelines.NAMES)
def test_every_workload_passes_the_gates_of_difffast(name):
    made = Images(pipelines.stages(name, full=False, batch=1, device="cpu", dtype=torch.float32), 20)
    record = measure(real(made, *providers.presets()), 1e9)
    # Reuse is far off where random weights make pixels: that is measured, not promised.
    assert set(record["absent"]) <= {"difffast turbo"}
    assert all(absent["status"] == "failed" for absent in record["absent"].values())


def test_copies_share_weights_and_nothing_else(images):
    mine, own = images.copy(own_weights=False), images.copy(own_weights=True)
    pipe, theirs, apart = (each.stages[0].pipe for each in (images, mine, own))
    for name, weight in pipe.unet.named_parameters():
        assert theirs.unet.get_parameter(name) is weight
        assert apart.unet.get_parameter(name).data_ptr() != weight.data_ptr()
    assert theirs.unet is not pipe.unet
    assert theirs.scheduler is not pipe.scheduler
    assert torch.equal(mine.run().result, own.run().result)
    assert mine.run().outputs == 2 * STEPS  # guidance
    mine.stop_counting()
    assert mine.run().outputs is None
    assert not mine.stages[0].pipe.unet.conv_out._forward_hooks


def test_seconds_inside_the_unet_are_a_part_of_the_call(images):
    mine = dataclasses.replace(images, unet_only=True).copy(own_weights=False)
    assert 0 < mine.run().seconds < 60
    assert "unet" not in vars(mine.stages[0].pipe) or not hasattr(mine.stages[0].pipe.unet, "in_place_of")
    assert images.run().seconds is None


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")  # IF hands on -1 to 1
@pytest.mark.parametrize("name", pipelines.NAMES)
def test_every_workload_runs_twice_the_same(name):
    made = Images(pipelines.stages(name, full=False, batch=2, device="cpu", dtype=torch.float32), 2)
    mine = made.copy(own_weights=False)
    first = mine.run()
    assert first.result.shape[:2] == (2, 3)
    assert first.result.isfinite().all()
    assert first.outputs == 2 * 2 * 2 * len(made.stages)  # batch, guidance, steps
    assert torch.equal(mine.run().result, first.result)


def test_an_unknown_workload():
    with pytest.raises(ValueError, match=r"unknown pipeline 'SD9'; available: SD1\.5"):
        pipelines.stages("SD9", full=False, batch=1, device="cpu", dtype=torch.float32)


def test_the_scaling_curves_know_their_latents():
    for name in ("SD1.5", "SDXL", "IF-II"):
        stage = pipelines.stages(name, full=False, batch=1, device="cpu", dtype=torch.float32)[0]
        assert stage.pipe.unet.config.sample_size == pipelines.latent_size(name, full=False)


def test_pyramid_attention_broadcast_is_removed_again(pipe):
    before = latents(pipe, steps=STEPS)
    with peers.pyramid_attention_broadcast(pipe, 2, 4):
        first, second = latents(pipe, steps=STEPS), latents(pipe, steps=STEPS)
    assert not torch.equal(first, before)
    assert torch.equal(first, second)
    assert torch.equal(latents(pipe, steps=STEPS), before)


def test_a_missing_package_is_a_missing_row(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    record = measure(real(images, providers.token_merging(0.5)), 1e9)
    assert record["absent"]["tomesd 50%"]["status"] == "missing"
    assert "[bench]" in record["absent"]["tomesd 50%"]["reason"]


def test_options_of_tomorrow_are_missing_today(images):
    fast = providers.difffast("fast", "balanced", Gate(), warp_factor=9)
    record = measure(real(images, fast), 1e9)
    assert record["absent"]["fast"] == {"status": "missing", "reason": "difffast.patch takes no warp_factor yet"}


def test_peak_memory():
    with PeakMemory(torch.device("cpu")) as peak:
        x = torch.zeros(1000)
        y = x + 1
        assert float(y[:10].sum()) == 10  # a view holds nothing, a scalar 4 bytes
        del x
        z = y.view(10, 100) * 2
        del y, z
        torch.zeros(100)
    assert peak.bytes == 2 * 4000 + 4
    with PeakMemory(torch.device("cpu")) as peak:
        torch.zeros(10).add_(1)
    assert peak.bytes == 40


def test_memory_of_more_decoders_at_once_is_seen(images):
    tracked = dataclasses.replace(images, memory=True)

    def decoding(together):
        propagation = difffast.EncoderPropagation(max_parallel=together)
        gate = Gate(tolerance=registry.APPROXIMATION)
        return providers.difffast(f"{together}", "faster-diffusion", gate, propagation=propagation)

    record = measure(real(tracked, decoding(1), decoding(4)), 1e9)
    weights = sum(weight.nbytes for weight in images.stages[0].pipe.unet.parameters())
    assert record["peak_bytes"]["4"] > record["peak_bytes"]["1"] > weights
    assert record["seconds"] == {}


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_selections(size):
    """Cases are built when they are measured: listing them needs no GPU."""
    cases = [each for suite in SUITES for each in importlib.import_module(suite).cases(size, None)]
    names = [str(each) for each in cases]
    assert len(set(names)) == len(names) > 10
    for each in cases:
        assert re.fullmatch(r"[\w.-]+", str(each))
        assert each.device == ("cuda" if size == "gpu" else "cpu")
        json.dumps(dict(each.shapes))
        for bar in each.bars:
            assert {bar.provider, bar.against} <= {provider.name for provider in each.providers}
    published = {each.shapes.get("pipeline") for each in cases}
    assert set(pipelines.NAMES) <= published


def test_your_own_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "mine")
    found = [each for suite in SUITES for each in importlib.import_module(suite).cases("cpu", str(tmp_path / "mine"))]
    assert [str(each) for each in found] == ["pipelines-mine-20-steps-batch-1", "pipelines-mine-50-steps-batch-1"]
    (stage,) = found[0].build().stages
    assert tuple(stage.pipe.unet.config.block_out_channels) == pipe.unet.config.block_out_channels
    tolerances = {each.gate.tolerance for each in found[0].providers}
    assert tolerances == {None, 1.0}
