"""Who encodes at key steps: every process of dimension "dec", or one that sends its features to the others.

Where one encodes, the others wait for it, and for the bytes.  On devices of their own they are ready earlier alone;
where they are in each other's way (memory bandwidth, a power budget), or where one device is slower, that may turn.  So
both ways are timed, unless the user says which it shall be.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..sampling.division import ENCODERS
from ..unet.features import Features
from .exchange import gather, name_loss

EVERY, ONE = ENCODERS

#: Key steps that are timed of each way.
TIMED = 3


class EncoderTimes:
    """Which way is the faster one, as the processes find out together, in one run after another.

    Args:
        asked: one of ``ENCODERS``, or None: what is measured to be faster.
    """

    def __init__(self, asked: str | None) -> None:
        self.asked = asked
        self._times: dict[Any, dict[str, list[float]]] = {}  # by the shapes of the features
        self._chosen: dict[Any, str] = {}

    def choose(self, shapes: Any) -> tuple[str, bool]:
        """Return who encodes features of some shapes at the next key step, and whether that is to be timed."""
        known = self.asked or self._chosen.get(shapes)
        if known is not None:
            return known, False
        times = self._times.setdefault(shapes, {EVERY: [], ONE: []})
        return min(ENCODERS, key=lambda way: len(times[way])), True

    def add(self, shapes: Any, way: str, seconds: float) -> Tensor | None:
        """Take in how long a key step has taken here.

        Returns:
            median seconds [2] of each of ``ENCODERS`` once they are known, for :meth:`settle`.
        """
        times = self._times[shapes]
        times[way].append(seconds)
        if min(map(len, times.values())) < TIMED:
            return None
        return torch.tensor([statistics.median(times[each]) for each in ENCODERS])

    def settle(self, shapes: Any, seconds: Tensor) -> str:
        """Choose by the seconds [n, 2] of all processes, and return what was chosen and why.

        Who waits the longest for features holds up all the others at the next exchange.
        """
        every, one = seconds.amax(0).tolist()
        self._chosen[shapes] = ONE if one < every else EVERY
        return (
            f"the encoder runs in {self._chosen[shapes]} from now on: features are there after {1e3 * every:.3g} ms "
            f"where every process encodes, after {1e3 * one:.3g} ms where one sends them"
        )


class Encoders:
    """Gives every process of a group the features of the key steps of one run.

    Args:
        group: the processes.
        times: what is known of both ways.
        counts: where "calls" and "bytes" are counted.
        record: puts a reason into the report.
    """

    def __init__(self, group: Any, times: EncoderTimes, counts: Counter[str], record: Callable[[str], object]) -> None:
        self._group, self._times, self._counts, self._record = group, times, counts, record
        self._sender = dist.get_process_group_ranks(group)[0]
        #: What features are like, by the rows of the batch: without values.
        self._known: dict[int, Features] = {}
        self._device = torch.device("cpu")

    def encode(self, encode: Callable[[], Features], rows: int) -> Features:
        """Return the features of a key step.

        Args:
            encode: makes them here, as all processes do at the first key step, when nobody knows their shapes.
            rows: samples in the batch.
        """
        alike = self._known.get(rows)
        if alike is None:
            features = encode()
            tensors = features.list_tensors()
            self._device = tensors[0].device
            self._known[rows] = features.fill([torch.empty_like(each, device="meta") for each in tensors])
            return features
        shapes = tuple((tuple(each.shape), each.dtype) for each in alike.list_tensors())
        way, timed = self._times.choose(shapes)
        start = self._look_at_clock() if timed else 0.0
        features = encode() if way == EVERY else self._share(encode, alike)
        if timed:
            medians = self._times.add(shapes, way, self._look_at_clock() - start)
            if medians is not None:
                found = gather(medians.to(self._device), self._group, "times of encoders", self._counts)
                self._record(self._times.settle(shapes, found))
        return features

    def forget(self) -> None:
        """Expect features of another structure."""
        self._known.clear()

    def _look_at_clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _share(self, encode: Callable[[], Features], alike: Features) -> Features:
        """Return the features that one process makes and the others receive, which expect some ``alike``."""
        sends = dist.get_rank() == self._sender
        features = encode() if sends else alike
        tensors = features.list_tensors()
        received = list(tensors)
        for dtype in dict.fromkeys(each.dtype for each in tensors):
            places = [place for place, each in enumerate(tensors) if each.dtype == dtype]
            flat = self._broadcast([tensors[place] for place in places], sends=sends)
            parts = flat.split([tensors[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                received[place] = part.view(tensors[place].shape)
        return features if sends else features.fill(received)

    def _broadcast(self, tensors: Sequence[Tensor], *, sends: bool) -> Tensor:
        """Return the sender's tensors of one dtype, end to end [numel]."""
        if sends:
            flat = torch.cat([each.reshape(-1) for each in tensors])
        else:
            size = sum(each.numel() for each in tensors)
            flat = torch.empty(size, dtype=tensors[0].dtype, device=self._device)
        with name_loss("the features of a key step", self._group):
            dist.broadcast(flat, self._sender, group=self._group)
        self._counts["calls"] += 1
        self._counts["bytes"] += 0 if sends else flat.numel() * flat.element_size()
        return flat
