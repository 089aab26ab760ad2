"""ControlNet under shared features: it belongs to the encoder, and runs where the encoder or a part of it does.

The pipeline calls it at every step, before the UNet.  Where only the decoder runs between key steps, it returns what it
returned at the last one.  Where outer layers run, it runs as well: its current residuals belong to the skips that these
make anew.
Sources: Faster Diffusion (arXiv 2312.09608), section 4 (ControlNet); for every step, DeepCache's package.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..engines.user_compiled import is_compiled_wrapper, unwrap
from ..surgery.calls import bind_arguments
from ..surgery.subclass import is_swapped, plain_class, swap_in, swap_out
from ..unet.fingerprint import Fingerprint
from ..unet.parts import RESIDUALS
from .calls import find_pipeline_call
from .components import forget, run_model, time_part
from .settings import Settings


class RunFinder(Protocol):
    """Who knows the run that a call belongs to: the controller of a UNet."""

    def find_run(self, timestep: Any, device: torch.device) -> Any:
        """Return the run of a timestep, or None."""
        ...


@dataclass
class _Held:
    """What ControlNet returned at the step where it ran last, and the latest step that it was returned for."""

    fingerprint: Fingerprint
    step: int
    output: Any


class ControlOutputs:
    """ControlNet's outputs in one run.

    Args:
        counts: where "computed" and "reused" are counted.
    """

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._held: _Held | None = None

    def answer(
        self, call: Mapping[str, Any], step: int, *, builds: bool, reuse: bool, stock: Callable[[], Any]
    ) -> tuple[Any, str | None]:
        """Return the outputs for the UNet call that follows, and the name of what has changed since they were made.

        Args:
            call: arguments of the ControlNet by name.
            step: the position in the schedule.
            builds: whether the UNet call builds on what an earlier step has left.
            reuse: whether outputs of an earlier step will then do.
            stock: runs it.
        """
        fingerprint, change = Fingerprint(call), None
        if self._held is not None and builds:
            change = fingerprint.find_change(self._held.fingerprint)
            if change is None and reuse:
                self._held.step = step
                self._counts["reused"] += 1
                return self._held.output, None
        output = stock()
        self._held = _Held(fingerprint, step, output)
        self._counts["computed"] += 1
        return output, change

    def refuse(self, call: Mapping[str, Any], step: int) -> str | None:
        """Return why the residuals of a UNet call cannot belong to the features of another step, or None."""
        down, mid, _ = (call.get(name) for name in RESIDUALS)
        if down is None and mid is None:
            return None
        if self._held is None or self._held.step != step:
            return "residuals are given that are not of the patched pipeline's own ControlNet"
        if down is None or mid is None:
            return "residuals are given for the skips or the middle only"
        return None

    def forget(self) -> None:
        """Drop the outputs."""
        self._held = None


def put_in(controlnet: nn.Module, user: Settings, finder: RunFinder) -> None:
    """Let the runs of ``finder`` decide, for one pipeline of perhaps several, whether ``controlnet`` runs."""
    if not is_swapped(controlnet):
        swap_in(controlnet, _override_controlnet(controlnet), equal=not is_compiled_wrapper(controlnet))
    type(controlnet)._difffast_users.append((user, finder))


def take_out(controlnet: nn.Module, user: Settings) -> None:
    """Undo :func:`put_in`."""
    if is_swapped(controlnet):
        users = type(controlnet)._difffast_users
        users[:] = [each for each in users if each[0] is not user and each[0].pipe() is not None]
        if not users:
            swap_out(controlnet)
            forget(controlnet)


def _time(stock: Callable[[], Any]) -> Callable[[], Any]:
    def timed() -> Any:
        with time_part("ControlNet"):
            return stock()

    return timed


def _override_controlnet(controlnet: nn.Module) -> dict[str, Any]:
    plain, users = plain_class(controlnet), []

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain.__call__(self, *args, **kwargs)
        arguments = bind_arguments(unwrap(self), args, kwargs)
        stock = functools.partial(plain.__call__, self, *args, **kwargs)
        running = find_pipeline_call()
        pipe = None if running is None else running.pipe()
        # Pipelines may share the scheduler, whose time steps then tell nothing of whose call it is.
        for settings, finder in sorted(users, key=lambda user: user[0].pipe() is not pipe):
            run = finder.find_run(arguments["timestep"], arguments["sample"].device)
            if run is not None:
                if settings.engine == "openvino" and not is_compiled_wrapper(self) and not torch.is_grad_enabled():
                    stock = functools.partial(run_model, self, "ControlNet", settings, stock, args, kwargs)
                return run.control(arguments, _time(stock))
        return stock()

    return {"__call__": call, "_difffast_users": users}
