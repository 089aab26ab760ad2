"""The processes that torchrun or accelerate has started, and how they end together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .exchange import ProcessLostError, name_loss
from .meshes import place_in, size_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@contextlib.contextmanager
def join_processes(device: str, timeout_s: float) -> Iterator[None]:
    """Join the processes that torchrun or accelerate has started, for the length of the block.

    Args:
        device: the kind of device that tensors are on; CUDA devices speak NCCL, and everything else gloo.
        timeout_s: how long a process waits for the others before it gives up.

    Raises:
        ProcessLostError: they do not all come within the timeout.
    """
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ProcessLostError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others within "
            f"{timeout_s:g} s: {reason}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


class Replicas:
    """Groups of processes that make pictures of their own: one for each place in dimension "dp".

    Args:
        sizes: of the mesh, by dimension, which must hold all processes.
        device: the kind of device that tensors are on.
    """

    def __init__(self, sizes: Mapping[str, int], device: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh: DeviceMesh = init_device_mesh(
            device.partition(":")[0], tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
        self.place, self.count = place_in(self.mesh, "dp"), size_of(self.mesh, "dp")
        #: Whether this process writes what its replica makes.
        self.writes = place_in(self.mesh, "cfg") == place_in(self.mesh, "dec") == 0
        self._size = dist.get_world_size() // self.count
        self._group = None
        # Every process has to take part in making every group.
        for members in self._list_members():
            group = dist.new_group(members, backend="gloo") if self._size > 1 else None
            if dist.get_rank() in members:
                self._group = group

    def _list_members(self) -> list[list[int]]:
        names, ranks = list(self.mesh.mesh_dim_names or ()), self.mesh.mesh
        if "dp" in names:
            ranks = ranks.movedim(names.index("dp"), 0)
        return ranks.reshape(self.count, -1).tolist()

    def share(self, value: Any, what: str) -> Any:
        """Return what process 0 gives as ``value``."""
        values = [value]
        with name_loss(what):
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def collect(self, value: Any, what: str) -> list[Any]:
        """Return what all processes give, in their order."""
        values: list[Any] = [None] * dist.get_world_size()
        with name_loss(what):
            dist.all_gather_object(values, value)
        return values

    def agree(self, failed: bool) -> None:
        """Compare within a replica whether a picture has failed: who did not fail would wait for who did.

        Raises:
            ProcessLostError: it failed in some processes alone, or another process is lost.
        """
        if self._group is None:
            return
        flags: list[Any] = [None] * self._size
        with name_loss("whether a picture has failed", self._group):
            dist.all_gather_object(flags, failed, group=self._group)
        if len(set(flags)) > 1:
            ranks = dist.get_process_group_ranks(self._group)
            wrong = [rank for rank, flag in zip(ranks, flags, strict=True) if flag]
            raise ProcessLostError(f"a picture failed in processes {wrong} alone, of {ranks} that make it together")
