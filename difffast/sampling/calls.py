"""Which pipeline's call is running in this thread: what a UNet call is told to mean by the pipeline that makes it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol


class EndingRun(Protocol):
    """A run that ends with the pipeline's call."""

    finished: bool

    def end(self) -> None:
        """Drop all that it has kept."""
        ...


class PipelineCall:
    """One call of a patched pipeline, from its beginning to its end.

    Args:
        pipe: the pipeline, of which only a weak reference is kept.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)
        self._runs: list[EndingRun] = []
        self._own: EndingRun | None = None

    def add(self, run: EndingRun) -> None:
        """Take note of a run that begins; one that begins before the last one is finished is of a loop inside."""
        if all(each.finished for each in self._runs):
            self._own = run
        self._runs.append(run)

    def speaks_of(self, run: EndingRun) -> bool:
        """Return whether the pipeline's attributes are those of a run: it is its own, not one of a loop inside."""
        return run is self._own

    def end(self) -> None:
        """Free what the runs have kept, wherever the pipeline was left."""
        self._own = None
        while self._runs:
            self._runs.pop().end()


_RUNNING: ContextVar[PipelineCall | None] = ContextVar("difffast_pipeline_call", default=None)


def find_pipeline_call() -> PipelineCall | None:
    """Return the call of a patched pipeline that is running in this thread, the innermost; None: a loop of one's own.

    It is also None in the call of a pipeline that is not patched but shares a patched one's UNet and scheduler.
    """
    return _RUNNING.get()


@contextlib.contextmanager
def begin_pipeline_call(pipe: Any) -> Iterator[PipelineCall]:
    """Let runs know, inside the block, that a pipeline's call is running."""
    call = PipelineCall(pipe)
    token = _RUNNING.set(call)
    try:
        yield call
    finally:
        _RUNNING.reset(token)
        call.end()
