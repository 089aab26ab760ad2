"""Which is faster for one function and shape: its converted model, or Python with the fused layers?

A kernel of ours may know more than an engine does: large convolutions in float32 take a quarter of the products.  So
both run, once, where they compute in the same precision.  Measured for Stable Diffusion 1.5 at 512x512 in float32 (2
threads, a Xeon with AMX): a UNet call takes 2.9 s in Python and 3.4 by OpenVINO, the VAE's decoder 4.5 and 9.3.

A file keeps the verdict, which is the same for all weights: where Python wins, the next process converts nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_whole
from ..ops import _local

#: Seconds of a model's call below which nothing is compared: there, what Python itself takes decides, and noise.
SHORTEST = 0.1
#: Share of the model's seconds that Python may take at most where it is to win: the model is what was asked for.
MARGIN = 0.95


@dataclass(frozen=True)
class Verdict:
    """How long a function takes.

    Attributes:
        function: its name.
        model: seconds of a call by its model.
        eager: seconds of a call in Python; None: not tried, because the model's are so few.
    """

    function: str
    model: float
    eager: float | None

    @property
    def eager_wins(self) -> bool:
        """Whether Python is to run it."""
        return self.eager is not None and self.eager <= MARGIN * self.model

    def __str__(self) -> str:
        eager = "an unknown time" if self.eager is None else f"{self.eager:.2f} s"
        return f"{self.function} {eager} a call, by its model {self.model:.2f}"


def race(function: str, model: Callable[[], Any], eager: Callable[[], Any]) -> Verdict:
    """Run both in turn, since the first call in Python also makes what layers keep; the faster calls count.

    Args:
        function: its name.
        model: runs the model, which has run before.
        eager: computes the same in Python.
    """
    by_model = _time(model)
    if by_model >= SHORTEST:
        by_model = min(by_model, _time(model))  # the first one may have been kept waiting
    if by_model < SHORTEST:
        return Verdict(function, by_model, None)
    in_python = _time(eager)
    return Verdict(function, min(by_model, _time(model)), min(in_python, _time(eager)))


def read(file: Path) -> Verdict | None:
    """Return what :func:`write` has written, or None: nothing, or of other kernels."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads(file.read_bytes())
        if found.pop("kernels") == _describe_kernels():
            verdict = Verdict(**found)
            return verdict if isinstance(verdict.eager_wins, bool) else None
    return None


def write(file: Path, verdict: Verdict) -> None:
    """Keep a verdict for other processes; where that cannot be, they find out by themselves."""
    with contextlib.suppress(OSError), write_whole(file) as part:
        part.write_text(json.dumps({**asdict(verdict), "kernels": _describe_kernels()}))


def _describe_kernels() -> str:
    """Return what Python's speed depends on besides what a file's name says: our kernels, and PyTorch's switches."""
    return _local.hash_facts(_local.find_facts(torch.device("cpu")))


def _time(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
