"""``difffast erase`` and ``difffast train-erase``: concepts out of a model's weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import check_writable
from .arguments import choose_device, finite, positive, seed
from .terminal import say

_METADATA = "metadata.jsonl"


def add_parsers(commands: Any) -> None:
    """Add both commands to the command line."""
    from ..erase.closed_form import METHODS as CLOSED
    from ..erase.losses import METHODS as TRAINED
    from ..erase.params import PARAMETER_SETS

    erase = commands.add_parser("erase", help="take concepts out of a model in seconds, in closed form")
    _add_common(erase)
    erase.add_argument("--guide", nargs="+", default=[""], metavar="PROMPT", help="what is drawn instead")
    erase.add_argument("--preserve", nargs="+", default=[], metavar="PROMPT", help="what stays as it is")
    erase.add_argument("--method", choices=sorted(CLOSED), default="uce")
    erase.add_argument("--lora", type=Path, metavar="FILE", help="write a LoRA, which can be left out, as well")
    erase.set_defaults(run=_erase)

    train = commands.add_parser("train-erase", help="take concepts out of a model by training")
    _add_common(train)
    train.add_argument("--method", choices=sorted(TRAINED), default="esd")
    train.add_argument(
        "--params", nargs="+", default=["xattn"], help=f"patterns of names, or one of {', '.join(PARAMETER_SETS)}"
    )
    train.add_argument("--steps", type=positive, default=200)
    train.add_argument("--learning-rate", type=finite, help="default: the method's")
    train.add_argument("--eta", type=finite, help="strength of ESD; default: the method's")
    train.add_argument("--erase-from", metavar="PROMPT", help="of esd-2025: what the concept is erased from")
    train.add_argument("--sampling-steps", type=positive, default=50, help="of trajectories from noise")
    train.add_argument("--pool", type=positive, help="points that one trajectory serves; default: one each")
    train.add_argument("--lora-rank", type=positive, help="train a LoRA; default: the weights themselves")
    train.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    train.add_argument("--checkpoints", type=Path, metavar="DIR", help="where checkpoints are kept")
    train.add_argument("--save-every", type=positive, default=100, help="steps between checkpoints")
    train.add_argument("--resume", metavar="FILE", help='a checkpoint, or "latest" of --checkpoints')
    train.add_argument("--seed", type=seed, default=0)
    for name, what in (("harmful", "show the concept"), ("related", "are near it"), ("unrelated", "are far from it")):
        text = f"meta-unlearning: pictures that {what}, and {_METADATA} with their file_name and text"
        train.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    train.set_defaults(run=_train)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder in Diffusers format, or a hub id; default: the embedded model")
    parser.add_argument("--concept", nargs="+", required=True, metavar="PROMPT", help="what is erased")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the new UNet")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def _load(arguments: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from .. import models

    # Weights are edited and trained in float32: the file can be loaded in any type.
    pipe = DiffusionPipeline.from_pretrained(arguments.model) if arguments.model else models.embedded_pipeline()
    return pipe.to(choose_device(arguments.device), torch.float32)


def _erase(arguments: argparse.Namespace) -> int:
    import warnings

    from ..erase.edit import erase

    _check_folder(arguments.out)
    if arguments.lora is not None:
        check_writable(arguments.lora)
    pipe = _load(arguments)
    edit = erase(pipe, arguments.concept, method=arguments.method, guide=arguments.guide, preserve=arguments.preserve)
    if arguments.lora is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            edit.save_lora(arguments.lora)
        say(f"written: {arguments.lora} (whoever loads a LoRA can leave it out: release the UNet)")
    edit.fuse()
    edit.save(arguments.out)
    say(edit)
    say(f"written: {arguments.out}, for UNet2DConditionModel.from_pretrained")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from ..erase.meta import MetaTrap
    from ..erase.trainer import EraseTrainer

    _check_folder(arguments.out)
    folders = [getattr(arguments, name) for name in ("harmful", "related", "unrelated")]
    if any(folders) and not all(folders):
        raise ValueError("meta-unlearning needs all of --harmful, --related and --unrelated")
    examples = [read_pairs(folder) for folder in folders] if all(folders) else []
    names = ("learning_rate", "eta", "erase_from", "sampling_steps", "pool", "lora_rank", "gradient_checkpointing")
    trainer = EraseTrainer(
        _load(arguments),
        arguments.concept,
        method=arguments.method,
        params=arguments.params[0] if len(arguments.params) == 1 else arguments.params,
        folder=arguments.checkpoints,
        **{name: getattr(arguments, name) for name in (*names, "save_every", "seed")},
    )
    if examples:
        trainer.attach(MetaTrap(*examples))
    losses = trainer.train(arguments.steps, resume=arguments.resume)
    trainer.fuse()
    trainer.save(arguments.out)
    say(f"{trainer.step} steps, the last with the loss {losses[-1]:.4g}")
    say(f"written: {arguments.out}, for UNet2DConditionModel.from_pretrained")
    return 0


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written before the time for its content is spent."""
    check_writable(folder / "config.json")


def read_pairs(folder: Path) -> list[tuple[Any, str]]:
    """Read pictures and prompts from a folder in the form of Hugging Face's "imagefolder".

    Raises:
        ValueError: a line that does not say a file's name and its text, or no line.
        OSError: a file cannot be read.
    """
    from PIL import Image

    pairs = []
    for number, line in enumerate((folder / _METADATA).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"line {number} of {folder / _METADATA} must be JSON with file_name and text, got {line[:80]!r}"
            ) from None
        with Image.open(folder / name) as picture:
            pairs.append((picture.convert("RGB"), text))
    if not pairs:
        raise ValueError(f"{folder / _METADATA} must have at least one line")
    return pairs
