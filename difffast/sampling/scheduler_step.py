"""``scheduler.step`` from edited latents: the one place where difffast comes between a pipeline and its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..surgery.subclass import plain_class

#: (scheduler, timestep, sample [B, C, H, W]) -> the latents to step from.
Edit = Callable[[Any, Any, Tensor], Tensor]


def override_step(scheduler: Any, edits: Sequence[Edit]) -> Callable[..., Any]:
    """Return a ``step`` for this scheduler that starts from what ``edits``, in turn, make of the latents."""
    plain = plain_class(scheduler)
    # Pipelines read step's signature to see what it accepts: it must stay visible.
    signature = inspect.signature(plain.step)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        extra = arguments.pop("kwargs", {})
        for edit in edits:
            arguments["sample"] = edit(self, arguments["timestep"], arguments["sample"])
        del arguments["self"]
        return plain.step(self, **arguments, **extra)

    step.__signature__ = signature
    step.__doc__ = plain.step.__doc__
    return step
