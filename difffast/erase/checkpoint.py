"""Checkpoints of training: one safetensors file each, with all that the rest of the run depends on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .saving import read_tensors, write_tensors

_NAME = re.compile(r"step-(\d{7})\.safetensors")


@dataclass
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step: how many steps were made.
        tensors: weights, optimiser, averages, random states and waiting points, by name.
        identity: what the run is of; a run that goes on must be of the same.
    """

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, keep: int) -> Path:
        """Write it and delete older ones but ``keep``; on a full disk all earlier ones stay.

        Raises:
            OSError: the file cannot be written.
        """
        path = folder / f"step-{self.step:07d}.safetensors"
        write_tensors(
            self.tensors, path, {"step": str(self.step), "identity": json.dumps(self.identity, sort_keys=True)}
        )
        for _, old in list_checkpoints(folder)[:-keep]:
            old.unlink(missing_ok=True)
        return path


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints of a folder, the oldest first, with their steps."""
    found = ((_NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted((int(match[1]), path) for match, path in found if match)


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint of a run that is like this one.

    Raises:
        ValueError: the file is damaged, no checkpoint of training, or one of another model or of other settings.
        OSError: it cannot be read.
    """
    tensors, metadata = read_tensors(path)
    try:
        step, stored = int(metadata["step"]), json.loads(metadata["identity"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} is no checkpoint of a training: its metadata lacks the step and the run") from None
    ours = json.loads(json.dumps(identity))
    for name in {**ours, **stored}:
        if stored.get(name) != ours.get(name):
            raise ValueError(
                f"{path} is a checkpoint of another run, which differs in {name}: {_shorten(stored.get(name))} there, "
                f"{_shorten(ours.get(name))} here"
            )
    return Checkpoint(step, tensors, stored)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def random_states(generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """Return the states of a generator and of the global ones."""
    states = {"own": generator.get_state(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], generator: torch.Generator, device: torch.device) -> None:
    """Put the states of :func:`random_states` back."""
    generator.set_state(states["own"])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
