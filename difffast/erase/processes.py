"""Training by one process or by several, through Hugging Face's accelerate if it is asked for."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """The processes that train together; gradients are averaged over them by hand, so that the UNet stays itself.

    Args:
        accelerator: None: this process alone.

    Raises:
        ValueError: the accelerator would scale losses, which float16 needs.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and accelerator.mixed_precision == "fp16":
            raise ValueError("mixed precision must be 'bf16' or 'no', got 'fp16', which would need scaled losses")
        self._accelerator = accelerator

    @property
    def count(self) -> int:
        return 1 if self._accelerator is None else self._accelerator.num_processes

    @property
    def rank(self) -> int:
        return 0 if self._accelerator is None else self._accelerator.process_index

    @property
    def precision(self) -> str:
        """The type that the UNet computes in by autocast, or "no"."""
        return "no" if self._accelerator is None else self._accelerator.mixed_precision

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the UNet runs in."""
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.autocast()

    def average(self, gradients: list[Tensor]) -> list[Tensor]:
        """Average gradients in place, in one message for each type."""
        if self.count > 1:
            for dtype in {gradient.dtype for gradient in gradients}:
                some = [gradient for gradient in gradients if gradient.dtype == dtype]
                flat = self._accelerator.reduce(torch.cat([g.flatten() for g in some]), "mean")
                for gradient, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
                    gradient.copy_(part.view_as(gradient))
        return gradients

    def average_number(self, value: float) -> float:
        """Return the mean of a number."""
        if self.count == 1:
            return value
        device = self._accelerator.device
        return float(self._accelerator.reduce(torch.tensor(value, device=device), "mean"))

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return every process's tensors."""
        if self.count == 1:
            return [tensors]
        from accelerate.utils import gather_object

        return gather_object([{name: tensor.cpu() for name, tensor in tensors.items()}])
