"""What is left of a training that was cut off, small enough for the repository: averaged weights, and where it was.

A machine may not be there any more when the next session of it would begin.  ``keep`` writes a checkpoint of each stage
without its optimiser, in float16; ``take_up`` lays these down as the checkpoints of another ``--out``, whose training
goes on from them with an optimiser that begins anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from difffast.files import write_whole

from .loop import load_checkpoint

_WEIGHTS, _LOGS = "*-checkpoint.pt", "*.json"
#: Logs that say how a training went; the others are captions.
_SUFFIXES = ("-losses.json", "-checks.json", "minutes.json")


def keep(out: Path, folder: Path) -> list[Path]:
    """Write what is left of a training to a folder, and return the files.

    Args:
        out: the training's folder.
        folder: to write to; what it has of an earlier state is replaced.

    Raises:
        ValueError: there is no checkpoint, or one is damaged.
    """
    checkpoints = sorted(out.glob(_WEIGHTS))
    if not checkpoints:
        raise ValueError(f"{out} must hold checkpoints ({_WEIGHTS}), found none")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in checkpoints:
        with write_whole(folder / path.name) as part:
            load_checkpoint(path, lambda state, part=part: torch.save(_reduce(state), part))
        written.append(folder / path.name)
    for path in sorted(out.glob(_LOGS)):
        if path.name.endswith(_SUFFIXES):
            shutil.copyfile(path, folder / path.name)
            written.append(folder / path.name)
    return written


def _reduce(state: dict) -> dict:
    average = state["average"]
    weights = [weight.half() for weight in average["weights"]]
    return {"average": {**average, "weights": weights}, "losses": state["losses"]}


def take_up(folder: Path, out: Path) -> list[Path]:
    """Lay down what was kept as the state of a training, and return the files; what ``out`` already has stays.

    Raises:
        ValueError: the folder holds nothing that was kept.
    """
    kept = [path for pattern in (_WEIGHTS, _LOGS) for path in sorted(folder.glob(pattern))]
    if not kept:
        raise ValueError(f"{folder} must hold what --keep wrote ({_WEIGHTS}), found none")
    out.mkdir(parents=True, exist_ok=True)
    laid = [out / path.name for path in kept if not (out / path.name).exists()]
    for path in laid:
        shutil.copyfile(folder / path.name, path)
    return laid
