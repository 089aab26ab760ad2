"""Timing of several providers in turn, in one run: A B C A B C ..."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Bytes written between two GPU timings, so that no provider finds its operands in the L2 cache.
_L2_BYTES = 256 << 20


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that makes these one after the other, and begins again."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def measure(
    providers: Mapping[str, Callable[[], Any]], *, rounds: int, device: str = "cpu", flush: bool = True
) -> dict[str, list[float]]:
    """Seconds of every provider in every round, after two calls that are not counted.

    Args:
        providers: name -> what to call.
        rounds: how often each is called.
        device: "cuda": timed by events on the stream; else by the clock.
        flush: on a GPU, clear the L2 cache before each call.
    """
    for _ in range(2):
        for call in providers.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    if device != "cuda":
        for _ in range(rounds):
            for name, call in providers.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        return seconds
    scratch = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
    marks = []
    for _ in range(rounds):
        for name, call in providers.items():
            if flush:
                scratch.zero_()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            marks.append((name, pair))
    torch.cuda.synchronize()
    for name, (start, end) in marks:
        seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Quartiles of ``slow`` / ``fast`` over the rounds: how many times faster ``fast`` is."""
    return quartiles([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Of at least two values; from two alone, the usual estimate would lie outside of them."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive" if len(values) == 2 else "exclusive")
    return low, middle, high


def copy_bandwidth() -> float:
    """Bytes that a large device-to-device copy reads and writes a second: the ceiling of whatever only moves memory."""
    x = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    seconds = measure({"copy": lambda: y.copy_(x)}, rounds=11, device="cuda")["copy"]
    return 2 * x.numel() / statistics.median(seconds)
