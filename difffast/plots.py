"""Figures for what difffast draws with matplotlib, which is the optional extra ``plots``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
