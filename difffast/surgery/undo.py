"""The undo stack: how changes are taken back, the last one first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class UndoStack:
    """Calls that take changes back; each may be made twice, and before its change is complete.

    A call is dropped only when it has returned: after an interruption :meth:`run` goes on where it was.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def add(self, function: Callable[..., object], *arguments: Any) -> None:
        """Register how a change is taken back; to be called before the change is made."""
        self._calls.append((function, arguments))

    def run(self) -> None:
        """Take everything back."""
        while self._calls:
            function, arguments = self._calls[-1]
            function(*arguments)
            self._calls.pop()
