"""One benchmark session: gates, interleaved rounds within a wall-clock budget, records that a later session reuses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from interleaved import ratio
from registry import ROUNDING, Case, Missing, Provider, Run, judge_bar
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from difffast.files import write_whole

#: Version of what a record means; part of its key.
FORMAT = 1

console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


class Replay:
    """pytest-benchmark's timer, for seconds that were measured already, in turn with those of other providers."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def through(self, benchmark: Any, seconds: Sequence[float]) -> None:
        """Let the fixture see one round for each of ``seconds``."""
        waiting = iter(seconds)

        def step() -> None:
            self._now += next(waiting)

        benchmark.pedantic(step, rounds=len(seconds), iterations=1)


REPLAY = Replay()


@dataclass
class Budget:
    """Wall-clock seconds for a whole session, shared out among the cases that wait, by weight.

    Args:
        seconds: of the whole session.
        clock: tells the time in seconds.
        start: when the session began, by that clock; None: now.
    """

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    start: float | None = None
    _waiting: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"the budget must be positive, got {self.seconds} s")
        self.start = self.clock() if self.start is None else self.start

    def expect(self, cases: Iterable[Case]) -> None:
        """Tell which cases will ask for time."""
        self._waiting = {str(case): case.weight for case in cases}

    def take(self, case: Case) -> float:
        """The deadline of ``case``, which waits no more: its share of what is left for it and those that wait."""
        share = case.weight / (case.weight + sum(w for name, w in self._waiting.items() if name != str(case)))
        self._waiting.pop(str(case), None)
        now = self.clock()
        return now + share * max(0.0, self.start + self.seconds - now)


class _Unfit(Exception):  # noqa: N818
    """A provider cannot be timed: ("failed" or "refused" or ..., why)."""


class _Measurement:
    """One case being measured."""

    def __init__(self, case: Case, deadline: float, clock: Callable[[], float], tell: Callable[[str], object]) -> None:
        self.case, self.deadline, self.clock, self.tell = case, deadline, clock, tell
        self.calls: dict[str, Callable[[], Run]] = {}
        self.truths: dict[str, Run] = {}
        self.costs: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.absent: dict[str, dict[str, str]] = {}
        self.gates: dict[str, dict[str, Any]] = {}
        self.peaks: dict[str, int] = {}

    def gate(self, provider: Provider, subject: Any, stack: ExitStack) -> None:
        """Make a provider ready and let it prove itself; the run warms it up as well."""
        low = self.case.rounds[0]
        expected = provider.startup + max(self.costs.values(), default=0.0) * (1 + low)
        if self.clock() + expected + low * sum(self.costs.values()) > self.deadline:
            self.absent[provider.name] = {"status": "not run", "reason": "over the budget"}
            return
        self.tell(f"gate of {provider.name}")
        try:
            with _verdicts(provider):
                call = provider.enter(subject, stack)
                start = self.clock()
                run = call()
                took = self.clock() - start
            self._prove(provider, run)
        except _Unfit as verdict:
            self._drop(provider, verdict)
            return
        # The first run of a compiled provider compiles: it is taken to be no slower than stock afterwards.
        self.costs[provider.name] = min(took, self.costs.get(self.case.baseline, took))
        self.calls[provider.name], self.truths[provider.name] = call, run
        self.seconds[provider.name] = []
        if run.peak_bytes is not None:
            self.peaks[provider.name] = run.peak_bytes

    def _prove(self, provider: Provider, run: Run) -> None:
        """Compare a run with the gate's provider's.

        Raises:
            _Unfit: it is wrong, or did less work than it claims.
        """
        gate = provider.gate
        truth = run if gate.against == provider.name else self.truths.get(gate.against)
        if truth is None:
            raise _Unfit("failed", f"nothing to compare with: {gate.against} was not measured")
        tolerance = ROUNDING[self.case.dtype] if gate.tolerance is None else gate.tolerance
        error = _error(run.result, truth.result)
        stock = self.truths.get(self.case.baseline, run)
        self.gates[provider.name] = {
            "against": gate.against,
            "error": error,
            "tolerance": tolerance,
            "error_to_baseline": _error(run.result, stock.result),
        }
        if not error <= tolerance:
            raise _Unfit("failed", f"wrong: {error:.1e} from {gate.against}, tolerance {tolerance:.1e}")
        if run.outputs is not None and stock.outputs is not None and run.outputs < round(gate.share * stock.outputs):
            raise _Unfit(
                "failed", f"skips work: {run.outputs} outputs computed, {round(gate.share * stock.outputs)} due"
            )

    def rounds(self) -> None:
        """Time everybody who passed, in turn, until the deadline; every result has to pass again."""
        low, high = self.case.rounds
        if any(absent["status"] == "not run" for absent in self.absent.values()):
            high = low  # the record is not the last word: more rounds would be time taken from other cases
            if len(self.calls) == 1 and high:
                (alone,) = [provider for provider in self.case.providers if provider.name in self.calls]
                self._drop(alone, _Unfit("not run", "over the budget, like everybody to compare it with"))
        longest = 0.0
        for turn in range(high):
            start = self.clock()
            if turn >= low and start + longest > self.deadline:
                break
            for provider in [p for p in self.case.providers if p.name in self.calls]:
                self.tell(f"round {turn + 1}: {provider.name}")
                try:
                    with _verdicts(provider):
                        run, seconds = _timed(self.calls[provider.name], self.clock, self.case.device)
                    self._prove(provider, run)
                except _Unfit as verdict:
                    self._drop(provider, verdict)
                    continue
                self.seconds[provider.name].append(seconds)
            longest = max(longest, self.clock() - start)

    def _drop(self, provider: Provider, verdict: _Unfit) -> None:
        status, reason = verdict.args
        self.absent[provider.name] = {"status": status, "reason": reason}
        for kept in (self.calls, self.costs, self.seconds, self.peaks):
            kept.pop(provider.name, None)

    def record(self) -> dict[str, Any]:
        case = self.case
        values = {"seconds": self.seconds, "peak_bytes": {name: [peak] for name, peak in self.peaks.items()}}
        return {
            "case": case.name,
            "shapes": dict(case.shapes),
            "dtype": case.dtype,
            "timed": case.timed,
            "baseline": case.baseline,
            "headline": case.headline,
            "kinds": {provider.name: provider.kind for provider in case.providers},
            "gate": self.gates,
            "absent": self.absent,
            "seconds": {name: taken for name, taken in self.seconds.items() if taken},
            "peak_bytes": self.peaks,
            "bars": [judge_bar(bar, values[bar.of]) for bar in case.bars],
        }


def measure(
    case: Case,
    deadline: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Let everybody prove himself, then time those who did in turn, until the deadline.

    Providers that cannot be timed ``case.rounds[0]`` times before the deadline are left out, from the last one on.

    Args:
        case: what to measure.
        deadline: by ``clock``.
        tell: told what is going on.

    Returns:
        The record: ``seconds`` of everyone who was timed, and in ``absent`` why everyone else was not.
    """
    measurement = _Measurement(case, deadline, clock, tell)
    with ExitStack() as stack, torch.no_grad():
        tell("building")
        subject = case.build()
        for provider in _truths_first(case.providers):
            measurement.gate(provider, subject, stack)
        measurement.rounds()
    return measurement.record()


def _truths_first(providers: Sequence[Provider]) -> list[Provider]:
    """In order, but those that others are gated against before them."""
    by_name = {provider.name: provider for provider in providers}
    ordered: dict[str, Provider] = {}
    for provider in providers:
        chain = [provider]
        while chain[-1].gate.against != chain[-1].name and chain[-1].gate.against not in ordered:
            chain.append(by_name[chain[-1].gate.against])
        ordered.update((each.name, each) for each in reversed(chain))
    return list(ordered.values())


@contextlib.contextmanager
def _verdicts(provider: Provider) -> Iterator[None]:
    """Turn what a provider raises into a verdict."""
    try:
        yield
    except Missing as reason:
        raise _Unfit("missing", str(reason)) from reason
    except Exception as error:
        if isinstance(error, ValueError) and provider.kind == "difffast":
            raise _Unfit("refused", str(error)) from error
        message = (str(error).strip().splitlines() or [""])[0]
        raise _Unfit("failed", f"{type(error).__name__}: {message}") from error


def _timed(call: Callable[[], Run], clock: Callable[[], float], device: str) -> tuple[Run, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return run, clock() - start if run.seconds is None else run.seconds


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error of norms; NaN and other shapes count as infinite."""
    if result.shape != truth.shape:
        return float("inf")
    difference, size = (result.double() - truth.double()).norm(), truth.double().norm()
    return float((difference / size).nan_to_num(nan=float("inf"))) if difference > 0 or size > 0 else 0.0


@dataclass
class Session:
    """Measures cases, or finds the record of an earlier session of the same code on the same machine.

    Args:
        folder: of the records, one file a case.
        budget: of the session.
        environment: device, threads, versions, commit: what a record is valid for.
    """

    folder: Path
    budget: Budget
    environment: Mapping[str, Any]

    def expect(self, cases: Iterable[Case]) -> None:
        """Share the budget out among the cases that have no record yet."""
        self.budget.expect(case for case in cases if self._found(case) is None)

    def record(self, case: Case) -> dict[str, Any]:
        """The record of a case, measured now if need be and written at once."""
        found = self._found(case)
        if found is not None:
            console.print(f"{case}: measured earlier, {self.path(case).name}", highlight=False, markup=False)
            return found
        deadline = self.budget.take(case)
        with console.status(str(case)) as status:
            record = measure(
                case, deadline, clock=self.budget.clock, tell=lambda text: status.update(f"{case}: {text}")
            )
        with write_whole(self.path(case)) as part:
            part.write_text(json.dumps(record, indent=1) + "\n")
        return record

    def report(self, benchmark: Any, case: Case) -> None:
        """Hand a case's record to pytest-benchmark and print it.

        Raises:
            AssertionError: stock or difffast failed, or a bar is missed.
        """
        record = self.record(case)
        benchmark.group = case.group
        benchmark.extra_info.update({**self.environment, **record})
        # pytest-benchmark leaves out who has no figure; where nothing was timed it gets 0, which nobody can mistake.
        shown = record["seconds"].get(case.headline) or record["seconds"].get(case.baseline) or [0.0]
        REPLAY.through(benchmark, shown)
        console.print(table(record))
        wrong = list(complaints(record))
        assert not wrong, "\n".join(wrong)

    def path(self, case: Case) -> Path:
        """Where the record of a case is: named for it, the commit and everything else that it is valid for."""
        valid_for = {name: self.environment.get(name) for name in sorted(self.environment) if name != "ceilings"}
        providers = [(provider.name, provider.kind, repr(provider.gate)) for provider in case.providers]
        key = repr((FORMAT, str(case), dict(case.shapes), case.dtype, case.rounds, case.bars, providers, valid_for))
        return self.folder / f"{case}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"

    def _found(self, case: Case) -> dict[str, Any] | None:
        """An earlier record, unless the budget had cut it short."""
        path = self.path(case)
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        cut_short = any(absent["status"] == "not run" for absent in record["absent"].values())
        return None if cut_short else record


def complaints(record: Mapping[str, Any]) -> Iterator[str]:
    """What must not go unseen: our own failures and missed bars; a peer's failure is a row in the table."""
    if "absent" not in record:
        return  # an operator's benchmark, which complains itself
    for name, absent in record["absent"].items():
        if absent["status"] == "failed" and record["kinds"][name] != "peer":
            yield f"{record['case']}: {name} failed: {absent['reason']}"
    for bar in record["bars"]:
        if bar["met"] is False:
            yield (
                f"{record['case']}: {bar['provider']} missed its bar: {bar['ratio']:.3f} of {bar['against']} "
                f"({bar['of']}), promised at most {bar['at_most']}"
            )


def table(record: Mapping[str, Any]) -> Table:
    """The record for a terminal."""
    columns = ("provider", record["timed"], f"of {record['baseline']}", "error")
    made = Table(*(Column(name, no_wrap=True) for name in columns), title=record["case"])
    for name in record["kinds"]:
        absent = record["absent"].get(name)
        if absent is not None:
            style = "red" if absent["status"] == "failed" else "dim"
            made.add_row(name, absent["status"], "", escape(absent["reason"])[:60], style=style)
            continue
        if name in record["seconds"]:
            amount = f"{statistics.median(record['seconds'][name]):.4g} s"
        else:
            amount = f"{record['peak_bytes'][name] / 2**20:.1f} MiB"
        made.add_row(name, amount, share(record, name), f"{record['gate'][name]['error_to_baseline']:.1e}")
    for bar in record["bars"]:
        verdict = {True: "met", False: "[bold red]missed[/]", None: "not measured"}[bar["met"]]
        ratio = "" if bar["ratio"] is None else f"{bar['ratio']:.3f}"
        made.add_row(f"bar: {bar['provider']} / {bar['against']}", verdict, ratio, f"at most {bar['at_most']}")
    return made


def share(record: Mapping[str, Any], name: str) -> str:
    """A provider's time, or memory, as a ratio to the baseline's; empty where that is absent."""
    baseline = record["baseline"]
    if name in record["seconds"] and baseline in record["seconds"]:
        return "{1:.3f} ({0:.3f} to {2:.3f})".format(*against(record, name))
    if name in record["peak_bytes"] and baseline in record["peak_bytes"]:
        return f"{record['peak_bytes'][name] / record['peak_bytes'][baseline]:.3f}"
    return ""


def against(record: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Quartiles of a provider's ratio to the baseline, round by round."""
    return ratio(record["seconds"], name, record["baseline"])
