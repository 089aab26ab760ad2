"""Checkpoints of training: one safetensors file each, with all that the rest of the run depends on."""

from __future__ import annotations

import itertools
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
        """Write it; of those that the run has come by ``keep`` stay, and on a full disk all earlier ones.

        Whatever else lies there, of another run or of a branch that was left by going back, is renamed to
        step-N.abandoned-K.safetensors: nothing takes it for a checkpoint of this run, and nothing of it is lost.

        Raises:
            OSError: the file cannot be written, or another one not be renamed.
        """
        path = folder / f"step-{self.step:07d}.safetensors"
        replaced = _set_aside(path) if path.exists() and path not in self.list_ancestors(folder) else None
        try:
            write_tensors(
                self.tensors, path, {"step": str(self.step), "identity": json.dumps(self.identity, sort_keys=True)}
            )
        except BaseException:
            if replaced is not None:
                replaced.replace(path)
            raise
        ancestors = self.list_ancestors(folder)
        for _, other in list_checkpoints(folder):
            if other not in ancestors:
                _set_aside(other)
        for old in ancestors[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def list_ancestors(self, folder: Path) -> list[Path]:
        """List the checkpoints that the run has come by, the oldest first: of the same run, with the same losses."""
        return [path for step, path in list_checkpoints(folder) if step <= self.step and self._descends_from(path)]

    def _descends_from(self, path: Path) -> bool:
        try:
            tensors, metadata = read_tensors(path, ["losses"])
            step, stored = _parse(metadata, path)
        except (ValueError, OSError):
            return False
        return stored == _as_stored(self.identity) and torch.equal(tensors["losses"], self.tensors["losses"][:step])


def _set_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.abandoned-{number}{path.suffix}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    path.rename(free)
    return free


def _parse(metadata: Mapping[str, str], path: Path) -> tuple[int, dict[str, Any]]:
    try:
        return int(metadata["step"]), json.loads(metadata["identity"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} is no checkpoint of a training: its metadata lacks the step and the run") from None


def _as_stored(identity: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(identity))


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
    step, stored = _parse(metadata, path)
    ours = _as_stored(identity)
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
