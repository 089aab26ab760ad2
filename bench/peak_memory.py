"""The most tensor memory that a block held at once, on a GPU or a CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Inside the block, watches memory; afterwards ``bytes`` is the peak above what was held on entry.

    On a GPU it asks PyTorch's allocator.  On a CPU it adds up the storages that eager operators return, from birth to
    death: what a kernel allocates inside, and what a compiled program does, is not seen there.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.bytes = device, 0
        self._held = 0
        self._alive: set[int] = set()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
            return self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._held
        else:
            super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage(), known)
        self.bytes = max(self.bytes, self._held)
        return result

    def _watch(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        """Count a storage that is not an operand's, for views share theirs, until it dies."""
        if storage._cdata in known or storage._cdata in self._alive:
            return
        self._alive.add(storage._cdata)
        self._held += storage.nbytes()
        weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())

    def _died(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._held -= size
