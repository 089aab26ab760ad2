"""Measurements of :func:`difffast.tune`, kept in a file so that an interrupted or a later call goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def identify(pipe: Any, steps: int, call: Mapping[str, Any]) -> str:
    """Return what a measurement holds for: weights, scheduler, steps, further arguments of the call, and device.

    Of the weights, names, shapes and some numbers of each count.
    """
    digest = hashlib.sha256()
    for name, weight in pipe.unet.state_dict().items():
        some = weight.flatten()[:: max(1, weight.numel() // 16)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {some.tolist()}".encode())
    scheduler = {name: str(value) for name, value in pipe.scheduler.config.items()}
    device = pipe.device.type
    machine = torch.cuda.get_device_name(pipe.device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts = [type(pipe.scheduler).__name__, scheduler, steps, machine, _describe(call)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _describe(value: Any) -> str:
    """Return what tells an argument of a call from others: of tensors and pictures all that is in them."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(content).hexdigest()}"
    if hasattr(value, "tobytes"):  # PIL's, NumPy's
        return f"{getattr(value, 'mode', '')} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return str([_describe(each) for each in value])
    if isinstance(value, Mapping):
        return str({name: _describe(each) for name, each in value.items()})
    return str(value)


class Measurements:
    """Measurements by candidate and prompt, written to a file after each.

    Args:
        path: of the file; None: none is kept.
        key: from :func:`identify`.
    """

    def __init__(self, path: str | Path | None, key: str) -> None:
        self._path = Path(path) if path is not None else None
        self._all: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            self._all = json.loads(self._path.read_text())
        self._mine: dict[str, dict[str, dict[str, Any]]] = self._all.setdefault(key, {})

    def count(self, name: str, prompt: str) -> int:
        """Return how often a candidate has been timed on a prompt."""
        return len(self._mine.get(name, {}).get(prompt, {}).get("repeats", ()))

    def add(self, name: str, prompt: str, seconds: float, **errors: float) -> None:
        """Add one more timing; the errors are the same every time."""
        found = self._mine.setdefault(name, {}).setdefault(prompt, {"repeats": []})
        found["repeats"].append(seconds)
        found.update(errors, seconds=min(found["repeats"]))
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".part")
            written.write_text(json.dumps(self._all, indent=1))
            written.replace(self._path)  # an interruption leaves the old file or the new one

    def column(self, name: str, prompts: Sequence[str], which: str) -> tuple[float, ...]:
        """Return one number of a candidate for every prompt."""
        return tuple(self._mine[name][prompt][which] for prompt in prompts)
