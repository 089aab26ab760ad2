"""What a process does with the memory that decoder batches free."""

from __future__ import annotations

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Once per process: let glibc's malloc keep what decoder batches free, instead of handing it back each time.

    Freeing one block just below 32 MiB makes glibc raise its mmap and trim thresholds, as any program with large
    tensors does sooner or later.  Measured on a (64, 128, 192) UNet at 32x32: 270,000 page faults an image become
    none, and time inside the UNet 0.68 of stock becomes 0.61 to 0.64.  Other allocators are not affected.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
