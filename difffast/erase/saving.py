"""Files of weights: safetensors only, each written as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_whole

_WEIGHTS = "diffusion_pytorch_model"


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name; what was at ``path`` stays there until the new file is complete.

    Raises:
        OSError: the file cannot be written, for one because the disk is full.
    """
    path = Path(path)
    # Copied: safetensors takes no views of one memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with write_whole(path) as part:
        try:
            save_file(copies, part, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}); what was there before is still there") from error


def read_tensors(path: str | Path, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file, on the CPU, and its metadata.

    Args:
        path: the file.
        names: of the tensors; None: all.

    Raises:
        ValueError: the file is damaged, no safetensors, or lacks one of the tensors.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, "pt") as file:
            wanted = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in wanted}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None


def save_unet(unet: Any, folder: str | Path) -> None:
    """Write a UNet so that ``UNet2DConditionModel.from_pretrained(folder)`` loads it.

    Raises:
        ValueError: the folder holds weights in another form, which would be loaded in place of these.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    name = f"{_WEIGHTS}.safetensors"
    others = [p.name for p in folder.glob(f"{_WEIGHTS}*") if p.name != name] if folder.is_dir() else []
    if others:
        raise ValueError(f"{folder} holds other weights already ({', '.join(sorted(others))}): name another folder")
    write_tensors(unet.state_dict(), folder / name)
    with write_whole(folder / "config.json") as part:
        part.write_text(unet.to_json_string())
