"""Results of recorded graphs that are handed out where the graph writes them, instead of copies.

What an encoder half leaves is tens of megabytes, of which a copy would be made after its replay and another one before
a decoder's.  Handed out is the graph's own memory, and a decoder's graph reads it where it lies.  Nobody may see it
change: a graph whose results are still held by anyone, be it by a view of a view, is not replayed.  Whoever holds a
result holds a storage of its own over that memory, so that storages tell.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack

#: Storages by the number by which PyTorch knows them; a weak reference keeps that number from being given anew.
_Holds = dict[int, tuple[StorageWeakRef, Tensor]]


class HandedOut:
    """Which results of one graph are out.

    Attributes:
        holds: the storages that were handed out last, and whose memory they lie in.
    """

    def __init__(self) -> None:
        self.holds: _Holds = {}

    def is_held(self) -> bool:
        """Return whether anybody still has a result, or a view of one."""
        return any(not storage.expired() for storage, _ in self.holds.values())

    def hand_out(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors over the memory of these; empty ones have none, and are made anew."""
        self.holds = {}
        return [self._share(result) if result.numel() else result.clone() for result in results]

    def _share(self, result: Tensor) -> Tensor:
        shared = from_dlpack(to_dlpack(result.detach()))
        storage = shared.untyped_storage()
        self.holds[storage._cdata] = (StorageWeakRef(storage), result)
        return shared

    def owns(self, value: Tensor) -> bool:
        """Return whether a tensor lies in what was handed out."""
        return value.untyped_storage()._cdata in self.holds

    def locate(self, value: Tensor) -> Tensor | None:
        """Return a tensor like this one in the graph's own memory, if that is where it lies; else None."""
        found = self.holds.get(value.untyped_storage()._cdata)
        if found is None:
            return None
        own = found[1].untyped_storage()
        start = (value.data_ptr() - own.data_ptr()) // value.element_size()
        return value.new_empty(0).set_(own, start, value.shape, value.stride())


def find_owner(graphs: Sequence[HandedOut], values: Sequence[Tensor]) -> HandedOut | None:
    """Return the one graph that has handed out some of these values, if there is just one.

    Values of several graphs are taken for anybody's: each order of them would need a recording of its own.
    """
    storages = [value.untyped_storage()._cdata for value in values]
    owners = [graph for graph in graphs if any(storage in graph.holds for storage in storages)]
    return owners[0] if len(owners) == 1 else None
