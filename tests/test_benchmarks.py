"""The benchmark harness: gates, interleaved rounds, budget, records; its figures come from ``make bench``."""

import importlib
import json

import pytest
from cases import TRUTH, Clock, case, everybody, raising, taking
from interleaved import quartiles
from registry import Bar, Gate, Missing, Provider, Run
from session import Budget, Replay, Session, complaints, measure


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
