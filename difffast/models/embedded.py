"""The embedded model: a small Stable Diffusion that draws captioned shapes, trained by ``bench/train_shapes.py``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole

if TYPE_CHECKING:  # from its own module: what type checkers see in diffusers is a stand-in that cannot be called
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

FOLDER = Path(__file__).parent / "embedded"
CHECKSUMS = "checksums.json"
_REMEDY = "reinstall difffast, or export the model again (bench/train_shapes.py --export)"


def embedded_pipeline(folder: str | Path = FOLDER) -> StableDiffusionPipeline:
    """Load the embedded model, which draws pictures of 64 x 64 pixels, in float32 and without a network.

    Args:
        folder: where the model is; another export of ``bench/train_shapes.py`` may be given.

    Raises:
        FileNotFoundError: the model or one of its files is missing.
        ValueError: a file is damaged, its SHA-256 is not the recorded one; or none is recorded for it.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    folder = Path(folder)
    check(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    # Cast after loading: the name of from_pretrained's dtype argument differs between Diffusers versions.
    return pipe.to(dtype=torch.float32)


def check(folder: Path) -> None:
    """Compare the files of a model with their recorded SHA-256 sums; raises as :func:`embedded_pipeline`.

    Hidden files, which systems put into any folder and nobody loads, need no sum.
    """
    sums = _read_checksums(folder)
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in sums and name != CHECKSUMS and not file.name.startswith("."):
            raise ValueError(f"{file} has no SHA-256 in {CHECKSUMS}, so that it may be damaged; {_REMEDY}")
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"the embedded model lacks {file}; {_REMEDY}")
        if _sha256(file) != expected:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the recorded {expected[:12]}...; {_REMEDY}")


def _read_checksums(folder: Path) -> dict[str, str]:
    record = folder / CHECKSUMS
    if not record.is_file():
        raise FileNotFoundError(f"no embedded model in {folder}: {CHECKSUMS} is missing; {_REMEDY}")
    try:
        sums = json.loads(record.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{record} is damaged: it is no JSON that can be read ({error}); {_REMEDY}") from None
    if not isinstance(sums, dict) or not all(isinstance(each, str) for each in sums.values()):
        raise ValueError(f"{record} is damaged: it must hold a SHA-256 for every file; {_REMEDY}")
    return sums


def write_checksums(folder: Path) -> None:
    """Record the SHA-256 of every file of an exported model."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    sums = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
    with write_whole(folder / CHECKSUMS) as part:
        part.write_text(json.dumps(sums, indent=2) + "\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
