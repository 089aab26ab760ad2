"""Where the time of one image goes: per block of the UNet, with operators, launches and synchronisations counted.

A synchronisation inside a UNet call makes the host wait for the device once a step, and nothing can be queued ahead.
On a GPU the profiler sees it (cudaStreamSynchronize and the like); on a CPU the operators that would cause it are seen.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..files import write_whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

_PREFIX = "difffast: "
#: Rows for what is in no block: the rest of a UNet call, and the pipeline around the calls.
_REST, _OUTSIDE = "unet, rest", "outside the unet"

#: Operators that hand a value of a tensor to Python, or need one to know the shape of their result.
_READING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class BlockProfile:
    """One row: a direct child of the UNet (down and up blocks apart), or what is left.

    Attributes:
        name: of the module.
        calls: how often it ran; a decoder batch counts once.
        host_s: seconds on the host; on a CPU, the seconds that it took.
        device_s: seconds of its kernels on the GPU; 0 on a CPU.
        operators: calls of PyTorch operators.
        launches: kernel and graph launches on the GPU; 0 on a CPU.
        synchronisations: how often the host waited for the device, or would have.
    """

    name: str
    calls: int
    host_s: float
    device_s: float
    operators: int
    launches: int
    synchronisations: int


@dataclass(frozen=True)
class Profile:
    """The rows, and where the trace is: a JSON file for https://ui.perfetto.dev."""

    blocks: tuple[BlockProfile, ...]
    trace: Path

    @property
    def synchronisations(self) -> int:
        """Inside UNet calls."""
        return sum(row.synchronisations for row in self.blocks if row.name != _OUTSIDE)


def profile(pipe: DiffusionPipeline, generate: Callable[[], object], trace: Path) -> Profile:
    """Profile one image of a pipeline, patched or not.

    ``generate`` runs three times: to warm up, to count operators, and under the profiler.

    Args:
        pipe: with an eager UNet.
        generate: makes one image with it.
        trace: where the Perfetto trace goes; folders are made.

    Raises:
        ValueError: the pipeline has no UNet, or a compiled one, whose blocks cannot be told apart.
        OSError: the trace cannot be written.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise ValueError(f"{type(pipe).__name__} has no UNet to profile")
    if hasattr(unet, "_orig_mod"):
        raise ValueError("the UNet is compiled: its blocks cannot be told apart; profile the eager one")
    generate()
    counter = OperatorCounter()
    with _watch(pipe, counter.enter_block, counter.leave_block), counter:
        generate()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if unet.device.type == "cuda" else [])]
    ranges: list[Any] = []

    def enter(name: str) -> None:
        ranges.append(record_function(_PREFIX + name))
        ranges[-1].__enter__()

    def leave() -> None:
        ranges.pop().__exit__(None, None, None)

    with torch.profiler.profile(activities=activities) as recorded:
        with _watch(pipe, enter, leave), record_function(_PREFIX + _OUTSIDE):
            generate()
        if unet.device.type == "cuda":
            torch.cuda.synchronize()
    with write_whole(trace) as part:
        recorded.export_chrome_trace(str(part))
    return Profile(tuple(_rows(recorded.events(), counter)), trace)


class OperatorCounter(TorchDispatchMode):
    """Counts operators and those that would synchronise, by the block in which they run.

    Attributes:
        operators, synchronisations: name of the block -> count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self._inside = [_OUTSIDE]

    def enter_block(self, name: str) -> None:
        self._inside.append(name)

    def leave_block(self) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.operators[self._inside[-1]] += 1
        name = operator._schema.name
        self.synchronisations[self._inside[-1]] += name in _READING or _copies_to_host(name, args, result)
        return result


def _copies_to_host(name: str, args: Any, result: Any) -> bool:
    """Whether an operator copies from a device to the host."""
    if name not in ("aten::_to_copy", "aten::copy_"):
        return False
    source = args[1] if name == "aten::copy_" else args[0]
    devices = [t.device.type for t in tree_leaves((source, result)) if isinstance(t, torch.Tensor)]
    return len(devices) == 2 and devices[0] != "cpu" and devices[1] == "cpu"


def blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The UNet's direct children by name, lists of blocks taken apart."""
    found: dict[str, nn.Module] = {}
    for name, child in unet.named_children():
        if isinstance(child, torch.nn.ModuleList):
            found.update((f"{name}.{i}", block) for i, block in enumerate(child))
        else:
            found[name] = child
    return found


class _Calls:
    """In place of ``pipe.unet``: tells when a call begins and ends."""

    def __init__(self, unet: nn.Module, enter: Callable[[str], object], leave: Callable[[], object]) -> None:
        self._unet, self._enter, self._leave = unet, enter, leave

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._enter(_REST)
        try:
            return self._unet(*args, **kwargs)
        finally:
            self._leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


@contextlib.contextmanager
def _watch(pipe: Any, enter: Callable[[str], object], leave: Callable[[], object]) -> Iterator[None]:
    """Tell ``enter`` and ``leave`` about every UNet call and every block in it; afterwards all is as before.

    Hooks on blocks are seen by both halves of a patched UNet and keep nothing from being fused; on the UNet itself
    they would make it run stock, so that a stand-in takes the pipeline's calls.
    """
    unet, handles = pipe.unet, []
    for name, block in blocks_of(unet).items():
        handles.append(block.register_forward_pre_hook(lambda *_, name=name: enter(name) and None))
        handles.append(block.register_forward_hook(lambda *_: leave() and None, always_call=True))
    vars(pipe)["unet"] = _Calls(unet, enter, leave)
    try:
        yield
    finally:
        del vars(pipe)["unet"]
        pipe.unet = unet
        for handle in handles:
            handle.remove()


def _rows(events: Any, counter: OperatorCounter) -> Iterator[BlockProfile]:
    """Rows from the profiler's events, in the order in which blocks first ran."""
    calls, launches, waits = Counter(), Counter(), Counter()
    host, device = Counter(), Counter()
    for event in events:
        block = _block(event)
        if block is None or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if event.name == _PREFIX + block:
            calls[block] += 1
            # Blocks lie within UNet calls, and these within the image: what is left is each one's own.
            host[block] += event.cpu_time_total
            device[block] += event.device_time_total
            outer = None if event.cpu_parent is None else _block(event.cpu_parent)
            if outer is not None:
                host[outer] -= event.cpu_time_total
                device[outer] -= event.device_time_total
        launches[block] += event.name in _LAUNCHES
        waits[block] += event.name in _WAITS
    names = [name for name in calls if name not in (_REST, _OUTSIDE)]
    for name in (*names, _REST, _OUTSIDE):
        yield BlockProfile(
            name=name,
            calls=calls[name],
            host_s=host[name] / 1e6,
            device_s=device[name] / 1e6,
            operators=counter.operators[name],
            launches=launches[name],
            synchronisations=max(waits[name], counter.synchronisations[name]),
        )


def _block(event: Any) -> str | None:
    """The innermost block around an event."""
    while event is not None and not event.name.startswith(_PREFIX):
        event = event.cpu_parent
    return None if event is None else event.name.removeprefix(_PREFIX)
