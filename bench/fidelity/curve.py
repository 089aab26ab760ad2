"""The fewer-steps curve: what stock itself reaches in the same time, below which nobody needs a way to be faster."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

#: What is compared: a picture's likeness to the one that stock makes with all steps.
LIKENESS = ("psnr_db", "psnr_p10_db")
#: Pictures above it do not differ from stock's in 8 bits but by rounding.
SAME = 70.0

Row = Mapping[str, Any]


def share_of(row: Row) -> float:
    """Return the median share of stock's time, from ratios within rounds."""
    return statistics.median(row["ratios"])


def likeness_of(row: Row, of: str) -> float:
    """Return the PSNR in dB; infinite where pictures are the same, which JSON holds as null; NaN if not recorded."""
    value = row.get(of, math.nan)
    return math.inf if value is None else value


def trace_curve(rows: Mapping[str, Row], of: str, shares: Iterable[float]) -> list[float]:
    """Return the PSNR that stock with fewer steps reaches within these shares of stock's time.

    Between the measured counts of steps it is interpolated, for each spacing on its own; of both spacings the better
    counts.  Before the least count nothing is known, so that it is minus infinity; from stock's time on it is infinite.

    Args:
        rows: of one cell; of its ways those of the kinds "fewer steps" and "stock" are looked at.
        of: one of ``LIKENESS``.
        shares: of stock's time.
    """
    wanted = np.asarray(list(shares), float)
    best = np.full(len(wanted), -math.inf)
    fewer = {name: row for name, row in rows.items() if row["kind"] == "fewer steps" and row["ratios"]}
    for spacing in {name.partition(" steps")[2] for name in fewer}:
        points = sorted(
            (share_of(row), likeness_of(row, of)) for name, row in fewer.items() if name.endswith(f" steps{spacing}")
        )
        times, reached = np.array(points).T
        # Whoever has more time may take the fewer steps that are better.
        reached = np.maximum.accumulate(reached)
        best = np.maximum(best, np.where(wanted < times[0], -math.inf, np.interp(wanted, times, reached)))
    return np.where(wanted >= 1, math.inf, best).tolist()


def find_dominated(rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Return the ways that stock with fewer steps beats in the same time, with what they lack of its PSNR in dB.

    A way is dominated if its median or its 10th percentile lies below the curve.  One that is stock but for rounding
    is so only where it is slower than stock in three of four rounds: less than that is noise.

    Args:
        rows: of one cell; rows without seconds are left out.
    """
    found = {}
    for name, row in rows.items():
        if row["kind"] in ("stock", "fewer steps") or not row["ratios"]:
            continue
        same = not any(likeness_of(row, of) <= SAME for of in LIKENESS)
        if same and np.quantile(row["ratios"], 0.25) <= 1:
            continue
        lacks = {of: trace_curve(rows, of, [share_of(row)])[0] - likeness_of(row, of) for of in LIKENESS}
        lacks = {of: lack for of, lack in lacks.items() if lack > 0}
        if lacks:
            found[name] = lacks
    return found
