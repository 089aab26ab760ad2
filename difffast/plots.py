"""Figures for what difffast draws with matplotlib, which is the optional extra ``plots``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> Figure:
    """Make an empty figure that no window shows; ``options`` are those of :class:`matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f"drawing needs matplotlib: `pip install matplotlib`, or `.[plots]` in a checkout ({error})"
        ) from error
    return Figure(layout="constrained", **options)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as a picture of the kind that the path ends in, as a whole or not at all.

    Raises:
        ValueError: matplotlib knows no such kind.
        OSError: the file cannot be written.
    """
    with write_whole(path) as part:
        figure.savefig(part, format=Path(path).suffix[1:] or "png", dpi=120)
