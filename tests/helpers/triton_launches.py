"""What launchers of Triton kernels ask for, without a launch."""

from collections.abc import Callable
from typing import Any


class Recorder:
    """Stands in for a kernel and appends the grid of every launch to ``grids``."""

    def __init__(self, grids: list[tuple[int, ...]]) -> None:
        self.grids = grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.grids.append(grid)
        return lambda *_, **__: None
