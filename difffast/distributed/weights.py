"""Whether all processes hold the same weights, by a checksum of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .exchange import gather

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Elements that are summed at once: sums of int64 need eight bytes for each.
_CHUNK = 1 << 22

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def check_equal(mesh: DeviceMesh, pipe: Any, options: str) -> None:
    """Compare the weights of all modules of a pipeline, and what was asked for, between the processes of a mesh.

    Args:
        mesh: the processes, all of which have to call this.
        pipe: the pipeline.
        options: what was asked for, as text.

    Raises:
        ValueError: in every process, if any two of them differ; it says in what, where this process knows.
    """
    tensors = dict(_list_tensors(pipe))
    names = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()]
    head = torch.tensor([_digest(options), _digest("\n".join(names)), len(names)])
    reason = _compare(
        mesh, head, ("other options", "modules of other names, shapes or dtypes", "more or fewer tensors")
    )
    _refuse_any(mesh, reason, options)
    sums = torch.stack([sum_bits(tensor).cpu() for tensor in tensors.values()])
    reason = _compare(mesh, sums, [f"other weights, first in {name}" for name in tensors])
    _refuse_any(mesh, reason, options)


def sum_bits(tensor: Tensor) -> Tensor:
    """Return two int64 numbers [2] of a tensor's bits: their sum, and their sum weighed by place; equal or not.

    Tensors without storage have none, and wrapped ones those of what they wrap.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(sum_bits(getattr(tensor, name)).cpu() for name in tensor.__tensor_flatten__()[0])
    if tensor.is_meta or tensor.layout is not torch.strided:
        return torch.zeros(2, dtype=torch.int64)
    bits = tensor.detach().reshape(-1).view(_INTEGERS.get(tensor.element_size(), torch.int32))
    found = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        places = torch.arange(chunk.numel(), device=chunk.device) % 8191 + 1 + number
        found += torch.stack([chunk.sum(dtype=torch.int64), (chunk * places).sum()])
    return found


def _list_tensors(pipe: Any) -> Iterator[tuple[str, Tensor]]:
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, nn.Module):
            yield from (*module.named_parameters(part), *module.named_buffers(part))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _compare(mesh: DeviceMesh, numbers: Tensor, meanings: Any) -> str | None:
    """Return in what the first other process along any dimension differs, or None."""
    reason = None
    for dimension in mesh.mesh_dim_names or ():
        group = mesh.get_group(dimension)
        found = gather(numbers.to(mesh.device_type), group, "checksums of weights").cpu()
        ranks = torch.distributed.get_process_group_ranks(group)
        for rank, theirs in zip(ranks, found, strict=True):
            differ = (theirs != numbers).reshape(len(numbers), -1).any(1)
            if reason is None and differ.any():
                reason = f"process {rank} has {meanings[int(differ.nonzero()[0])]}"
    return reason


def _refuse_any(mesh: DeviceMesh, reason: str | None, options: str) -> None:
    """Raise in all processes if there is a reason in any of them, so that none waits for one that has given up."""
    refused = torch.tensor([reason is not None], dtype=torch.int64, device=mesh.device_type)
    for dimension in mesh.mesh_dim_names or ():
        refused = gather(refused, mesh.get_group(dimension), "whether the processes are alike").amax(0)
    if refused.item():
        raise ValueError(
            "all processes of a mesh must load the same pipeline and patch it alike: "
            f"{reason or 'others of them differ'} (here: {options})"
        )
