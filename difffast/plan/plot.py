"""The picture of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..plots import new_figure, save_figure
from .rows import PlanStep

_PARTS = ("outer layers", "encoder", "bottleneck", "decoder")


def plot_plan(rows: Sequence[PlanStep], path: str | Path) -> None:
    """Draw which parts of the UNet run at which step, as PNG or SVG; decoders of one batch share a frame.

    Steps that run the conditional half of the batch alone are half as high; at forecast steps nothing runs.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(figsize=(max(6.0, 1.5 + len(rows) / 6), 2.4))
    from matplotlib.patches import Rectangle  # only here: new_figure says what to do where it is missing

    axis = figure.subplots()
    for row in rows:
        ran = _find_parts(row)
        colour = "C3" if row.full else "C0" if row.key else "C1"
        for part in ran:
            place = (row.step - 0.4, _PARTS.index(part) - 0.4)
            axis.add_patch(Rectangle(place, 0.8, 0.4 if row.half else 0.8, color=colour))
        first, last = row.decoded_with[0], row.decoded_with[-1]
        if row.step == first != last:
            axis.add_patch(Rectangle((first - 0.5, 2.5), last - first + 1, 1, fill=False, linewidth=1.5))
    axis.set(
        xlim=(rows[0].step - 1, rows[-1].step + 1), ylim=(3.6, -0.6), xlabel="step", yticks=range(4), yticklabels=_PARTS
    )
    skipped = sum(row.forecast for row in rows)
    keys = f"{sum(row.key for row in rows)} key steps of {len(rows)} (blue)"
    more = f", {skipped} forecast (nothing)" if skipped else ""
    axis.set_title(f"{keys}, in between (orange), optimised (red){more}", size=9)
    save_figure(figure, path)


def _find_parts(row: PlanStep) -> tuple[str, ...]:
    """Return what of the UNet runs at a step."""
    if row.key:
        return _PARTS
    if row.forecast:
        return ()
    return ("outer layers",) if row.reuse else ("decoder",)
