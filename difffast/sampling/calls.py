"""Which pipeline's call is running in this thread: what a UNet call is told to mean by the pipeline that makes it."""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from .state import RunState


class EndingRun(Protocol):
    """A run that ends with the pipeline's call."""

    finished: bool
    state: RunState

    def end(self) -> None:
        """Drop all that it has kept."""
        ...


class PipelineCall:
    """One call of a patched pipeline, from its beginning to its end.

    Args:
        pipe: the pipeline, of which only a weak reference is kept.
        profile: whether the seconds of its parts are counted.
    """

    def __init__(self, pipe: Any, *, profile: bool = False) -> None:
        self.pipe = weakref.ref(pipe)
        self._runs: list[EndingRun] = []
        self._own: EndingRun | None = None
        self._reasons: list[str] = []  # of parts that run before and after the UNet
        self._profile, self._seconds = profile, {}
        self._timing = False
        self._device = getattr(pipe, "device", torch.device("cpu")) if profile else None
        self._start = self._now() if profile else 0.0

    def add(self, run: EndingRun) -> None:
        """Take note of a run that begins; one that begins before the last one is finished is of a loop inside."""
        if all(each.finished for each in self._runs):
            self._own = run
            run.state.stats.seconds = self._seconds
            for reason in self._reasons:
                run.state.record(reason)
        self._runs.append(run)

    def note(self, reason: str) -> bool:
        """Put a reason into the report of the call's run, also of one that has not begun; returns whether it is new."""
        if self._own is not None:
            return self._own.state.record(reason)
        new = reason not in self._reasons
        if new:
            self._reasons.append(reason)
        return new

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the seconds of the block for a part; those of parts inside of it are the outer one's."""
        if not self._profile or self._timing:
            yield
            return
        self._timing, start = True, self._now()
        try:
            yield
        finally:
            self._timing = False
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def speaks_of(self, run: EndingRun) -> bool:
        """Return whether the pipeline's attributes are those of a run: it is its own, not one of a loop inside."""
        return run is self._own

    def end(self) -> None:
        """Free what the runs have kept, wherever the pipeline was left."""
        if self._profile:
            self._seconds["the rest"] = self._now() - self._start - sum(self._seconds.values())
        self._own = None
        while self._runs:
            self._runs.pop().end()


_RUNNING: ContextVar[PipelineCall | None] = ContextVar("difffast_pipeline_call", default=None)


def find_pipeline_call() -> PipelineCall | None:
    """Return the call of a patched pipeline that is running in this thread, the innermost; None: a loop of one's own.

    It is also None in the call of a pipeline that is not patched but shares a patched one's UNet and scheduler.
    """
    return _RUNNING.get()


def find_caller() -> Any:
    """Return the pipeline one of whose methods is running in this thread, the innermost, patched or not; or None.

    One that is not patched tells nobody that it runs: only the stack knows.
    """
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                return owner
        frame = frame.f_back
    return None


@contextlib.contextmanager
def begin_pipeline_call(pipe: Any, *, profile: bool = False) -> Iterator[PipelineCall]:
    """Let runs know, inside the block, that a pipeline's call is running, whose parts are timed if so wanted."""
    call = PipelineCall(pipe, profile=profile)
    token = _RUNNING.set(call)
    try:
        yield call
    finally:
        _RUNNING.reset(token)
        call.end()
