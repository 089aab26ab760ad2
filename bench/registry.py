"""The registry: what a benchmark case is, who competes in it, and what each has to prove before it is timed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from workloads import Run

#: Largest relative error (of norms) of a provider that computes what its gate's provider computes, by dtype.  float32:
#: measured 6e-7 for fused layers after 50 steps; the others: not measured on a GPU.
ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
#: Largest relative error of an approximation.  On a UNet with random weights, 50 steps: encoder propagation 0.04,
#: DeepCache 5, branch 0, 0.06, tomesd 50% 0.02, never running the UNet again after the first step 0.32.
APPROXIMATION = 0.15
#: The same for stock with fewer steps, which is no approximation of the schedule at all; 15 of 50 steps: 0.27.
FEWER_STEPS = 0.5

#: Seconds that compiling a UNet takes, roughly: what a budget must have left for it.
COMPILATION = 60.0

STOCK = "stock"
COMPILED = "stock compiled"
PLAIN_OPENVINO = "plain OpenVINO"


class Missing(Exception):  # noqa: N818
    """A provider does not exist in this installation; the message says why."""


@dataclass(frozen=True)
class Gate:
    """What a provider has to prove before it is timed.

    Attributes:
        against: the provider whose result is the truth.
        tolerance: largest relative error of norms; None: :data:`ROUNDING` of the case's dtype.
        share: of stock's samples through the UNet's output layer; fewer are skipped work, which an error cannot show:
            on random weights, answering every second step from memory has the error of an honest approximation.
    """

    against: str = STOCK
    tolerance: float | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Provider:
    """One way to do what the case asks for.

    Attributes:
        name: its row in the tables.
        kind: "stock", "peer" or "difffast".
        enter: makes it ready for a case's subject, what has to be undone going on the stack, and returns the call to
            time.  Raises :class:`Missing`, or ValueError where it refuses the subject.
        gate: what it has to prove.
        startup: seconds that its first run is expected to take on top of the others', for the budget.
    """

    name: str
    kind: str
    enter: Callable[[Any, ExitStack], Callable[[], Run]]
    gate: Gate = field(default_factory=Gate)
    startup: float = 0.0


@dataclass(frozen=True)
class Bar:
    """A promise about a ratio, kept or not: it is recorded and reported either way.

    Attributes:
        provider, against: names; the ratio is the first's to the second's, the median over the rounds.
        at_most: largest ratio that keeps it.
        of: "seconds" or "peak_bytes".
        source: who promised it.
    """

    provider: str
    against: str
    at_most: float
    of: str = "seconds"
    source: str = ""


def judge_bar(bar: Bar, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return a bar with the ratio that was measured and whether it is met; None where somebody is absent."""
    measured = None
    if values.get(bar.provider) and values.get(bar.against):
        rounds = zip(values[bar.provider], values[bar.against], strict=True)
        measured = statistics.median(mine / theirs for mine, theirs in rounds)
    return {
        "provider": bar.provider,
        "against": bar.against,
        "of": bar.of,
        "at_most": bar.at_most,
        "source": bar.source,
        "ratio": measured,
        "met": None if measured is None else measured <= bar.at_most,
    }


@dataclass(frozen=True)
class Case:
    """One comparison: everybody in turn, in one run.

    Attributes:
        group: the suite, a section of the report.
        name: unique within the group.
        shapes: what was measured, as plain numbers and strings: steps, batch, latent size, widths, k.
        dtype, device: of the computation.
        build: makes the subject that providers enter.
        providers: in order of importance: where the budget ends, the last are left out.
        timed: what the seconds are of.
        baseline: the provider that ratios refer to.
        headline: whose seconds pytest-benchmark's own tables show.
        rounds: fewest and most interleaved rounds; (0, 0) measures no time.
        weight: its share of the budget among the cases that are left; on two CPU cores, seconds that it wants.
        bars: promises.
    """

    group: str
    name: str
    shapes: Mapping[str, Any]
    dtype: str
    device: str
    build: Callable[[], Any] = field(repr=False)
    providers: tuple[Provider, ...] = field(repr=False)
    timed: str
    baseline: str = STOCK
    headline: str = STOCK
    rounds: tuple[int, int] = (3, 11)
    weight: float = 1.0
    bars: tuple[Bar, ...] = ()

    def __post_init__(self) -> None:
        names = [provider.name for provider in self.providers]
        if len(set(names)) < len(names):
            raise ValueError(f"provider names must be unique, got {names}")
        for provider in self.providers:
            if provider.gate.against not in names:
                raise ValueError(f"{provider.name} is gated against {provider.gate.against!r}, which is not in {names}")
        if self.baseline not in names or self.headline not in names:
            raise ValueError(
                f"baseline and headline must be providers of the case, got {self.baseline!r}, "
                f"{self.headline!r}; providers: {names}"
            )
        low, high = self.rounds
        if not 0 <= low <= high or low == 1:
            raise ValueError(f"rounds must be (0, 0), or at least 2 and in order, got {self.rounds}")

    def __str__(self) -> str:
        return re.sub(r"[^\w.]+", "-", f"{self.group} {self.name}").strip("-")
