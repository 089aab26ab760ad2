"""``scheduler.step`` from edited latents: the one place where difffast comes between a pipeline and its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..surgery.subclass import plain_class

#: (scheduler, timestep, sample [B, C, H, W]) -> the latents to step from.
Edit = Callable[[Any, Any, Tensor], Tensor]
#: (scheduler, timestep, latents [B, C, H, W] that its step has made) -> those that the pipeline gets.
Result = Callable[[Any, Any, Tensor], Tensor]


def override_step(scheduler: Any, edits: Sequence[Edit], results: Sequence[Result] = ()) -> Callable[..., Any]:
    """Return a ``step`` for this scheduler that starts from what ``edits``, in turn, make of the latents.

    It returns what ``results``, in turn, make of the latents that it has made.
    """
    plain = plain_class(scheduler)
    # Pipelines read step's signature to see what it accepts: it must stay visible.
    signature = inspect.signature(plain.step)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        extra = arguments.pop("kwargs", {})
        for edit in edits:
            arguments["sample"] = edit(self, arguments["timestep"], arguments["sample"])
        del arguments["self"]
        stepped = plain.step(self, **arguments, **extra)
        for result in results:
            if isinstance(stepped, tuple):
                stepped = (result(self, arguments["timestep"], stepped[0]), *stepped[1:])
            else:
                stepped.prev_sample = result(self, arguments["timestep"], stepped.prev_sample)
        return stepped

    step.__signature__ = signature
    step.__doc__ = plain.step.__doc__
    return step
