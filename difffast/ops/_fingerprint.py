"""A number that tells whether any byte of some tensors has changed, as fast as memory can be read.

Not an operator of a network: nothing is proved or chosen.  With the compiled extension it is csrc/cpu/fingerprint.cpp;
without, sums over the bytes as integers, which do not see two numbers that change places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._installed import missing
from ._library import LIBRARY

LIBRARY.define("fingerprint(Tensor[] tensors) -> int")


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Return a number of 64 bits that is another one if any byte of the tensors is, as far as 64 bits can tell.

    Args:
        tensors: contiguous ones on the CPU.
    """
    with torch.no_grad():
        if missing("cpp") is None:
            return torch.ops.difffast.fingerprint(tensors) if tensors else 0
        return hash(tuple([_add_up(tensor) for tensor in tensors]))


def _add_up(tensor: Tensor) -> tuple[int, int]:
    data = tensor.detach().reshape(-1).view(torch.uint8)
    whole = 0 if data.data_ptr() % 8 or data.storage_offset() % 8 else data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum()), int(data[whole:].sum())


def view_as_it_lies(tensor: Tensor) -> Tensor:
    """Return a contiguous view of a tensor in channels_last, so that no copy is needed, and any other as it is."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor
