"""Timing: candidates in turn, round by round, on a CPU, by a GPU's events, and inside captured CUDA graphs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .candidates import Candidate
from .problems import Problem

#: Bytes of operands among which calls rotate, so that they come from memory as in a UNet.
_ROTATED = 1 << 28
#: Copies of a problem on a CPU: half of what a UNet's layer reads has just been written.
_COPIES_ON_CPU = 4
#: Calls in one captured graph, and of one measurement of the host.
CALLS = 20
#: Least and most rounds.
_FEWEST, _MOST = 4, 24
#: Seconds for all rounds, by kind of device.
_SECONDS = {"cuda": 0.4, "cpu": 0.06}
#: Products of an attention that a CPU times; of more samples than that, the first ones are.
MOST_ON_CPU = 1 << 25

#: Told where the run is, before anything that may crash or hang.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Times:
    """Times of one candidate.

    Attributes:
        rounds: of each round, in microseconds a call.
        host: median of the microseconds that the host takes for a call; 0 where it is a part of the rounds.
    """

    rounds: tuple[float, ...]
    host: float = 0.0

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The quartiles of the rounds; a call takes at least as long as the host does."""
        found = sorted(self.rounds)
        picked = (found[len(found) // 4], statistics.median(found), found[(3 * len(found)) // 4])
        return tuple(max(each, self.host) for each in picked)

    @property
    def microseconds(self) -> float:
        """What a call takes: the median."""
        return self.quartiles[1]


class Clock:
    """Times candidates on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None

    def time(self, candidates: Sequence[Candidate], sets: Sequence[Problem], mode: str, say: Say) -> dict[str, Times]:
        """Time candidates in turn.

        Args:
            candidates: what shall run.
            sets: the same problem several times, among which calls rotate.
            mode: "eager" or "graph".
            say: is told the candidate's name before it runs.

        Returns:
            The times, by name.
        """
        with torch.no_grad():
            if self.device.type != "cuda":
                return self._time_cpu(candidates, sets, say)
            return (self._time_eager if mode == "eager" else self._time_graph)(candidates, sets, say)

    def _time_cpu(self, candidates: Sequence[Candidate], sets: Sequence[Problem], say: Say) -> dict[str, Times]:
        calls = {}
        for each in candidates:
            say(each.name)
            with each.around():
                start = time.perf_counter()
                each.call(sets[0].key, *sets[0].tensors)
                once = time.perf_counter() - start
            # A call that takes long is seldom undisturbed, however often it runs.
            calls[each.name] = 1 if once > 0.02 else max(3, min(100, int(1e-3 / max(once, 1e-7))))
        found: dict[str, list[float]] = {each.name: [] for each in candidates}

        def run(each: Candidate) -> None:
            best = float("inf")
            with each.around():
                for i in range(calls[each.name]):
                    chosen = sets[i % len(sets)]
                    start = time.perf_counter()
                    each.call(chosen.key, *chosen.tensors)
                    best = min(best, time.perf_counter() - start)
            found[each.name].append(1e6 * best)  # what else runs on the processor only ever adds

        _go_round(candidates, run, say, _SECONDS["cpu"])
        return {name: Times(tuple(each)) for name, each in found.items()}

    def _time_eager(self, candidates: Sequence[Candidate], sets: Sequence[Problem], say: Say) -> dict[str, Times]:
        host = {each.name: self._time_host(each, sets, say) for each in candidates}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {each.name: [] for each in candidates}

        def run(each: Candidate) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            chosen = sets[len(events[each.name]) % len(sets)]
            with each.around():
                self._flush_cache()  # meanwhile the host runs ahead
                pair[0].record()
                each.call(chosen.key, *chosen.tensors)
                pair[1].record()
            events[each.name].append(pair)

        _go_round(candidates, run, say, _SECONDS["cuda"], torch.cuda.synchronize)
        return {
            name: Times(tuple(1e3 * start.elapsed_time(end) for start, end in pairs), host[name])
            for name, pairs in events.items()
        }

    def _time_host(self, each: Candidate, sets: Sequence[Problem], say: Say) -> float:
        say(each.name)
        found = []
        with each.around():
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for i in range(CALLS):
                    chosen = sets[i % len(sets)]
                    each.call(chosen.key, *chosen.tensors)
                found.append(1e6 * (time.perf_counter() - start) / CALLS)
            torch.cuda.synchronize()
        return statistics.median(found)

    def _time_graph(self, candidates: Sequence[Candidate], sets: Sequence[Problem], say: Say) -> dict[str, Times]:
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        for each in candidates:
            say(each.name)
            graphs[each.name] = capture(each, [sets[i % len(sets)] for i in range(CALLS)])[0]
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {each.name: [] for each in candidates}

        def run(each: Candidate) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush_cache()
            pair[0].record()
            graphs[each.name].replay()
            pair[1].record()
            events[each.name].append(pair)

        _go_round(candidates, run, say, _SECONDS["cuda"], torch.cuda.synchronize)
        return {
            name: Times(tuple(1e3 * start.elapsed_time(end) / CALLS for start, end in pairs))
            for name, pairs in events.items()
        }

    def _flush_cache(self) -> None:
        """Write more than the device's cache holds, which takes longer than the host needs for a call."""
        if self._flush is None:
            cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20)
            self._flush = torch.empty(max(4 * cache, _ROTATED), dtype=torch.uint8, device=self.device)
        self._flush.zero_()


def capture(candidate: Candidate, problems: Sequence[Problem]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """Capture a candidate's calls in a CUDA graph; return it, and where the last call's outputs lie."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    outputs: tuple[torch.Tensor, ...] = ()
    with candidate.around():
        with torch.cuda.stream(stream):
            for _ in range(3):
                candidate.call(problems[0].key, *problems[0].tensors)
        torch.cuda.synchronize()
        # Not torch.cuda.graph, which empties the allocator's cache every time.
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for each in problems:
                    outputs = candidate.call(each.key, *each.tensors)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is void; the first error says why
                    graph.capture_end()
                raise
            graph.capture_end()
    torch.cuda.synchronize()
    return graph, outputs


def _go_round(
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], None],
    say: Say,
    seconds: float,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Run all candidates in turn, in a new order in every round, until there are rounds enough or the time is over."""
    begin = time.perf_counter()
    for number in range(_MOST):
        for i in range(len(candidates)):
            each = candidates[(i + number) % len(candidates)]
            say(each.name)
            run(each)
            wait()
        if number + 1 >= _FEWEST and time.perf_counter() - begin > seconds:
            return


def count_sets(problem: Problem) -> int:
    """Return among how many copies of a problem calls should rotate."""
    size = sum(arena.nbytes for arena in problem.arenas)
    most = CALLS if problem.arenas[0].is_cuda else _COPIES_ON_CPU
    return max(1, min(most, _ROTATED // max(1, size)))


def pick(times: Mapping[str, Times], ours: Sequence[str], default: str, gain: float, least: float) -> str:
    """Choose a winner: PyTorch's default unless another one is faster by enough, and in two rounds of three.

    What is compared is the median of the quotients of rounds: neighbours in time share whatever else a machine does.

    Args:
        times: of all candidates that are right.
        ours: who has to beat the fastest of PyTorch's ways, not only the default.
        default: PyTorch's way where nothing is chosen.
        gain: the part of the time that has to be won.
        least: the microseconds that have to be won.
    """

    def quotients(name: str, other: str) -> list[float]:
        a, b = times[name], times[other]
        return [max(x, a.host) / max(y, b.host) for x, y in zip(a.rounds, b.rounds, strict=False)]

    def beats(name: str, other: str) -> bool:
        found = quotients(name, other)
        won = sum(each < 1 for each in found)
        enough = times[other].microseconds - times[name].microseconds >= least
        return enough and statistics.median(found) <= 1 - gain and 3 * won >= 2 * len(found)

    plain = [name for name in times if name not in ours]
    by_time = sorted(times, key=lambda name: times[name].microseconds)
    fastest = next(name for name in by_time if name in plain)
    for name in by_time:
        if name in ours and beats(name, fastest):
            return name
    return next((name for name in by_time if name in plain and name != default and beats(name, default)), default)
