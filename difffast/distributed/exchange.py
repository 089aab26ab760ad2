"""Collectives that are counted, and that end in a clear error when another process is lost."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessLostError(ConnectionError):
    """Another process has ended, has failed, or is later than the process group's timeout."""


@contextlib.contextmanager
def name_loss(what: str, group: Any = None) -> Iterator[None]:
    """Let errors of a collective in the block say what was exchanged, and with whom.

    Args:
        what: what is exchanged.
        group: the process group; None: all processes.

    Raises:
        ProcessLostError: the collective failed.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, (ProcessLostError, torch.OutOfMemoryError)):
            raise
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProcessLostError(
            f"process {dist.get_rank()} could not exchange {what} with processes {others}: one of them has ended, has "
            f"failed, does something else, or is later than the process group's timeout ({reason})"
        ) from error


def gather(tensor: Tensor, group: Any, what: str, counts: Counter[str] | None = None) -> Tensor:
    """Return the tensors [...] of all processes of a group as one [n, ...], in the group's order.

    Args:
        tensor: of the same shape, dtype and kind of device in every process.
        group: the process group.
        what: what it is, for errors.
        counts: where the call, and the bytes that this process receives, are counted.

    Raises:
        ProcessLostError: another process is lost.
    """
    processes = dist.get_world_size(group)
    found = tensor.new_empty((processes, *tensor.shape))
    with name_loss(what, group):
        dist.all_gather(list(found), tensor.contiguous(), group=group)
    if counts is not None:
        counts["calls"] += 1
        counts["bytes"] += (processes - 1) * tensor.numel() * tensor.element_size()
    return found
