"""Stock itself, with other timesteps or in another precision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .calls import replaced_forward


@contextlib.contextmanager
def with_spacing(pipe: Any, spacing: str) -> Iterator[None]:
    """Space the timesteps by Diffusers' ``timestep_spacing``: "leading" or "trailing"."""
    before = pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, timestep_spacing=spacing)
    try:
        yield
    finally:
        pipe.scheduler = before


@contextlib.contextmanager
def in_bfloat16(pipe: Any) -> Iterator[None]:
    """Run the UNet, which takes nearly all of the time, in bfloat16.

    Everything else stays in its precision: noise that is drawn in bfloat16 is other noise, and would make other
    pictures.
    """
    before = pipe.unet
    unet = copy.deepcopy(before).to(torch.bfloat16)
    stock = unet.forward

    def cast(values: Any, dtype: torch.dtype) -> Any:
        return tree_map(
            lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value, values
        )

    def forward(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        # Times are never rounded, as in a pipeline that was loaded in bfloat16.
        sample, args, kwargs = cast((sample, args, kwargs), torch.bfloat16)
        return cast(stock(sample, timestep, *args, **kwargs), before.dtype)

    pipe.unet = unet
    try:
        with replaced_forward(unet, forward):
            yield
    finally:
        pipe.unet = before
