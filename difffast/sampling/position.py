"""Where in a schedule a UNet call is, without reading anything from the device.

Diffusers' loops iterate over ``scheduler.timesteps``.  Their time steps are views of that tensor: shared storage
identifies the schedule, and the storage offset the position in it.  Of a copy, the scheduler knows the position.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_element(timestep: Any, timesteps: Any) -> bool:
    """Return whether ``timestep`` is a view of one element of ``timesteps`` (perhaps expanded over the batch)."""
    return (
        isinstance(timestep, Tensor)
        and isinstance(timesteps, Tensor)
        and timestep.device == timesteps.device
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        and (timestep.numel() == 1 or not any(timestep.stride()))
    )


def find_step(timestep: Tensor, timesteps: Tensor) -> int:
    """Return the position of an element of ``timesteps`` in it."""
    return (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)


def count_steps(scheduler: Any) -> int:
    """Return how many steps of its schedule a scheduler has made, or left out: the position of the next UNet call."""
    made = scheduler.step_index
    return made if made is not None else scheduler.begin_index or 0
