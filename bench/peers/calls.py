"""What peers share that replace calls: where in a schedule a call is, and how a forward is replaced and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Call ``forward`` in place of the module's own; afterwards the module is as it was."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextlib.contextmanager
def forwards_left_alone(unet: Any, *names: str) -> Iterator[None]:
    """Take away what packages leave in the modules of a UNet: forwards that are their own classes', and ``names``."""
    found = {(module, name) for module in unet.modules() for name in ("forward", *names) if name in vars(module)}
    try:
        yield
    finally:
        for module in unet.modules():
            for name in ("forward", *names):
                if name in vars(module) and (module, name) not in found:
                    delattr(module, name)


class Calls:
    """Counts the calls of a pipeline's UNet in each run."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._schedule = None
        self._index = 0

    def count(self) -> tuple[int, int]:
        """Count a call; return its index in this run, and how many the run has."""
        # A run sets the timesteps anew.  Nothing of them is read, so that no step waits for the device.
        if self._schedule is not self._pipe.scheduler.timesteps:
            self._schedule, self._index = self._pipe.scheduler.timesteps, -1
        self._index += 1
        return self._index, len(self._schedule)
