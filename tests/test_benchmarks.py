"""The benchmark harness: gates, interleaved rounds, budget, records; its figures come from ``make bench``."""

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
from interleaved import quartiles
from peak_memory import PeakMemory
from registry import Bar, Case, Gate, Missing, Provider, Run
from sampling import latents
from session import Budget, Replay, Session, complaints, measure
from workloads import Images, Stage

import difffast
from difffast.surgery.subclass import is_swapped

SUITES = ("bench_unet", "bench_pipelines", "bench_guidance", "bench_memory", "bench_full_size")
TRUTH = torch.arange(1.0, 9.0)
STEPS = 8


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def taking(clock, seconds, result=TRUTH, outputs=None):
    """A provider's ``enter``: each call takes so many seconds; ``result`` and ``outputs`` may depend on the call."""
    calls = 0

    def call():
        nonlocal calls
        calls += 1
        clock.now += seconds
        return Run(
            result(calls) if callable(result) else result, outputs=outputs(calls) if callable(outputs) else outputs
        )

    return lambda subject, stack: call


def raising(error):
    def enter(subject, stack):
        raise error

    return enter


def case(*providers, **options):
    defaults = {
        "group": "suite",
        "name": "a case",
        "shapes": {"steps": 50},
        "dtype": "float32",
        "device": "cpu",
        "build": lambda: None,
        "timed": "seconds",
        "rounds": (2, 4),
    }
    return Case(providers=providers, **{**defaults, **options})


def everybody(clock, *others, **options):
    return case(Provider("stock", "stock", taking(clock, 2.0, outputs=50)), *others, **options)


def test_faster_and_slower_are_shown_for_what_they_are():
    clock = Clock()
    fast = Provider("fast", "difffast", taking(clock, 1.0))
    slow = Provider("slow", "difffast", taking(clock, 5.0))
    record = measure(everybody(clock, fast, slow), 1000.0, clock=clock)
    assert record["seconds"] == {"stock": [2.0] * 4, "fast": [1.0] * 4, "slow": [5.0] * 4}
    assert record["absent"] == {}
    assert not list(complaints(record))


def test_rounds_are_interleaved():
    clock, order = Clock(), []

    def noting(name):
        def enter(subject, stack):
            def call():
                order.append(name)
                clock.now += 1
                return Run(TRUTH)

            return call

        return Provider(name, "stock", enter)

    measure(case(noting("stock"), noting("b"), noting("c"), rounds=(2, 2)), 100.0, clock=clock)
    assert order == ["stock", "b", "c"] * 3  # the gate, and two rounds


@pytest.mark.parametrize(
    ("result", "outputs", "gate", "reason"),
    [
        (TRUTH * 1.001, 50, Gate(), "wrong"),
        (TRUTH * float("nan"), 50, Gate(tolerance=0.5), "wrong"),
        (TRUTH[:4], 50, Gate(tolerance=0.5), "wrong"),
        (TRUTH * 1.01, 25, Gate(tolerance=0.15), "skips work: 25 outputs computed, 50 due"),
        (lambda n: TRUTH if n == 1 else TRUTH * 2, 50, Gate(), "wrong"),
        (TRUTH, lambda n: 50 if n < 3 else 0, Gate(), "skips work"),
    ],
    ids=["wrong", "NaN", "shape", "skips", "wrong after the gate", "skips after the gate"],
)
def test_who_is_wrong_or_skips_work_is_failed_and_not_fast(result, outputs, gate, reason):
    clock = Clock()
    cheat = Provider("cheat", "difffast", taking(clock, 0.1, result, outputs), gate)
    record = measure(everybody(clock, cheat), 1000.0, clock=clock)
    assert record["absent"]["cheat"]["status"] == "failed"
    assert reason in record["absent"]["cheat"]["reason"]
    assert list(record["seconds"]) == ["stock"]
    (complaint,) = complaints(record)
    assert "cheat failed" in complaint


def test_a_control_may_do_its_own_share_of_the_work_and_no_less():
    clock = Clock()
    honest = Provider("25 steps", "stock", taking(clock, 1.0, TRUTH * 1.3, 25), Gate(tolerance=0.5, share=0.5))
    lazy = Provider("24 steps", "stock", taking(clock, 1.0, TRUTH * 1.3, 24), Gate(tolerance=0.5, share=0.5))
    record = measure(everybody(clock, honest, lazy), 1000.0, clock=clock)
    assert set(record["seconds"]) == {"stock", "25 steps"}


def test_missing_refused_and_broken_providers_have_a_reason():
    clock = Clock()
    record = measure(
        everybody(
            clock,
            Provider("absent", "peer", raising(Missing("not installed"))),
            Provider("picky", "difffast", raising(ValueError("SDXL is not supported"))),
            Provider("broken", "peer", raising(ValueError("bad\nmore"))),
            Provider("after it", "difffast", taking(clock, 1.0), Gate("picky")),
        ),
        1000.0,
        clock=clock,
    )
    assert record["absent"] == {
        "absent": {"status": "missing", "reason": "not installed"},
        "picky": {"status": "refused", "reason": "SDXL is not supported"},
        "broken": {"status": "failed", "reason": "ValueError: bad"},
        "after it": {"status": "failed", "reason": "nothing to compare with: picky was not measured"},
    }
    assert set(record["seconds"]) == {"stock"}
    (complaint,) = complaints(record)  # a peer's failure is a row, not ours to fix
    assert "after it" in complaint


def test_truths_come_before_those_who_are_compared_with_them():
    clock = Clock()
    record = measure(
        everybody(
            clock,
            Provider("fast", "difffast", taking(clock, 1.0, TRUTH * 1.1), Gate("plain")),
            Provider("plain", "difffast", taking(clock, 1.0, TRUTH * 1.1), Gate(tolerance=0.15)),
        ),
        1000.0,
        clock=clock,
    )
    assert record["absent"] == {}
    assert record["gate"]["fast"]["error"] == 0
    assert record["gate"]["fast"]["error_to_baseline"] == pytest.approx(0.1)


def test_bars_are_met_missed_or_not_measured():
    clock = Clock()
    fast = Provider("fast", "difffast", taking(clock, 1.0))
    never = Provider("turbo", "difffast", raising(Missing("not yet")))
    bars = (Bar("fast", "stock", 0.5), Bar("fast", "stock", 0.4), Bar("turbo", "stock", 0.3))
    record = measure(everybody(clock, fast, never, bars=bars), 1000.0, clock=clock)
    assert [bar["met"] for bar in record["bars"]] == [True, False, None]
    assert [bar["ratio"] for bar in record["bars"]] == [0.5, 0.5, None]
    (complaint,) = complaints(record)
    assert "fast missed its bar: 0.500 of stock" in complaint


@pytest.mark.parametrize(("deadline", "rounds"), [(12.0, 2), (15.9, 2), (16.0, 3), (20.0, 4), (1000.0, 4)])
def test_rounds_fill_the_time(deadline, rounds):
    clock = Clock()
    other = Provider("other", "peer", taking(clock, 2.0))
    record = measure(everybody(clock, other), deadline, clock=clock)  # the gates take 4 s, every round 4 s
    assert {name: len(values) for name, values in record["seconds"].items()} == {"stock": rounds, "other": rounds}
    assert clock.now <= deadline


def test_the_last_are_left_out_where_the_time_ends():
    clock = Clock()
    others = [Provider(f"peer {n}", "peer", taking(clock, 2.0)) for n in range(4)]
    # Gate and two rounds of 2 s each: 6 s for each provider.
    record = measure(everybody(clock, *others, rounds=(2, 9)), 19.0, clock=clock)
    assert {name: len(values) for name, values in record["seconds"].items()} == dict.fromkeys(
        ("stock", "peer 0", "peer 1"), 2
    )
    assert record["absent"]["peer 2"] == {"status": "not run", "reason": "over the budget"}
    assert clock.now <= 19.0
    assert not list(complaints(record))


def test_nothing_runs_once_the_time_is_over():
    clock = Clock()
    clock.now = 10.0
    record = measure(everybody(clock, Provider("peer", "peer", taking(clock, 2.0))), 9.0, clock=clock)
    assert {name: absent["status"] for name, absent in record["absent"].items()} == {
        "stock": "not run",
        "peer": "not run",
    }
    assert clock.now == 10.0


def test_compiling_does_not_count_as_the_cost_of_a_round():
    clock = Clock()

    def enter(subject, stack):
        clock.now += 100

        def call():
            clock.now += 1
            return Run(TRUTH)

        return call

    last = Provider("peer", "peer", taking(clock, 2.0))
    record = measure(everybody(clock, Provider("compiled", "stock", enter), last), 120.0, clock=clock)
    assert set(record["seconds"]) == {"stock", "compiled", "peer"}


def test_time_to_start_up_has_to_be_left():
    clock = Clock()
    compiled = Provider("compiled", "stock", taking(clock, 2.0), startup=60.0)
    alone = measure(everybody(clock, compiled), 30.0, clock=clock)
    assert alone["seconds"] == {}  # stock alone would be compared with nobody
    assert {absent["status"] for absent in alone["absent"].values()} == {"not run"}
    assert clock.now == 2.0
    assert set(measure(everybody(clock, compiled), clock.now + 90.0, clock=clock)["seconds"]) == {"stock", "compiled"}


def test_the_budget_is_shared_by_weight_and_what_is_saved_goes_on():
    clock = Clock()
    budget = Budget(100.0, clock)
    cases = [everybody(clock, name=name, weight=weight) for name, weight in (("a", 1.0), ("b", 1.0), ("c", 2.0))]
    budget.expect(cases)
    assert budget.take(cases[0]) == 25.0
    clock.now = 10.0  # faster than allowed
    assert budget.take(cases[1]) == 10.0 + 90.0 / 3
    clock.now = 60.0  # slower than allowed
    assert budget.take(cases[2]) == 100.0
    clock.now = 130.0
    assert budget.take(cases[2]) == 130.0
    with pytest.raises(ValueError, match="positive, got 0"):
        Budget(0)


def test_quartiles_of_few_rounds_lie_among_them():
    assert quartiles([1.0, 3.0]) == (1.5, 2.0, 2.5)
    assert quartiles([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)


class Fixture:
    """What the session uses of pytest-benchmark's fixture."""

    def __init__(self, timer):
        self.extra_info, self.group, self.rounds, self._timer = {}, None, [], timer

    def pedantic(self, target, rounds, iterations):
        for _ in range(rounds):
            start = self._timer()
            target()
            self.rounds.append(self._timer() - start)


def test_pytest_benchmark_sees_the_seconds_that_were_measured():
    replay = Replay()
    fixture = Fixture(replay)
    replay.through(fixture, [0.5, 2.0, 1.0])
    assert fixture.rounds == [0.5, 2.0, 1.0]


def test_an_interrupted_run_goes_on_and_other_code_is_measured_anew(tmp_path, capsys):
    clock, built = Clock(), []

    def some(weight=1.0, **options):
        return everybody(clock, build=lambda: built.append(1), weight=weight, **options)

    def session(commit="abc", folder=tmp_path, ceilings=1.0):
        environment = {"commit": commit, "torch": "2.13", "threads": 2, "ceilings": {"copy_bytes_per_s": ceilings}}
        return Session(folder, Budget(1000.0, clock), environment)

    first = session().record(some())
    assert session(ceilings=2.0).record(some(weight=5.0)) == first
    assert len(built) == 1
    session("def").record(some())
    session().record(some(rounds=(2, 3)))
    session().record(some(name="another"))
    assert len(built) == 4
    waiting = session()
    waiting.expect([some(), some(name="third", weight=3.0)])
    assert waiting.budget.take(some(name="third", weight=3.0)) == clock.now + 1000.0  # nobody else waits
    assert not list(tmp_path.glob("*.part"))


def test_a_record_that_the_budget_cut_short_is_not_the_last_word(tmp_path):
    clock = Clock()
    late = Provider("late", "peer", taking(clock, 2.0))
    hurried = Session(tmp_path, Budget(7.0, clock), {"commit": "abc"})
    assert hurried.record(everybody(clock, late))["absent"]["late"]["status"] == "not run"
    patient = Session(tmp_path, Budget(1000.0, clock), {"commit": "abc"})
    assert set(patient.record(everybody(clock, late))["seconds"]) == {"stock", "late"}


def test_a_missed_bar_is_recorded_printed_and_fails(tmp_path, capsys):
    clock = Clock()
    slow = Provider("slow", "difffast", taking(clock, 3.0))
    missed = everybody(clock, slow, headline="slow", bars=(Bar("slow", "stock", 0.56),))
    fixture = Fixture(importlib.import_module("session").REPLAY)
    session = Session(tmp_path, Budget(1000.0, clock), {"commit": "abc"})
    with pytest.raises(AssertionError, match=r"slow missed its bar: 1\.500 of stock"):
        session.report(fixture, missed)
    assert fixture.rounds == [3.0] * 4
    assert fixture.group == "suite"
    assert fixture.extra_info["commit"] == "abc"
    assert fixture.extra_info["bars"][0]["met"] is False
    json.dumps(fixture.extra_info)
    assert "missed" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"rounds": (1, 3)}, {"rounds": (4, 3)}, {"baseline": "nobody"}])
def test_impossible_cases(options):
    with pytest.raises(ValueError, match=r"rounds must be|baseline and headline"):
        everybody(Clock(), **options)


def test_a_gate_needs_a_provider_of_the_case():
    with pytest.raises(ValueError, match="gated against 'nobody'"):
        everybody(Clock(), Provider("x", "peer", raising(Missing("")), Gate("nobody")))
    with pytest.raises(ValueError, match="unique"):
        everybody(Clock(), Provider("stock", "peer", raising(Missing(""))))


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
    made = Images(pipelines.stages(name, full=False, batch=1, device="cpu", dtype=torch.float32), 40)
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
