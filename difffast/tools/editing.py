"""``difffast suppress`` and ``difffast edit``: two pictures side by side, without and with the change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, write_whole
from . import terminal
from .arguments import choose_device, finite, positive, seed
from .terminal import say

if TYPE_CHECKING:
    from PIL.Image import Image

#: How a real picture can be inverted to be edited, the default first; EDICT's pictures come from a loop of their own.
_INVERSIONS = ("direct", "ddim", "npi", "null", "style", "ddcm")


def add_parsers(commands: Any) -> None:
    """Add the commands to the command line."""
    suppress = commands.add_parser("suppress", help="a picture without words of its prompt, beside the one with them")
    suppress.add_argument("--prompt", required=True)
    suppress.add_argument("--words", required=True, nargs="+", help="what is not wanted, as the prompt writes it")
    suppress.add_argument("--optimise", action="store_true", help="optimise the text while sampling; slower")
    suppress.add_argument("--step-size", type=finite, default=20.0, help="of the optimised text; 20 is for SD 1.x")
    suppress.add_argument("--strengthen", action="store_true", help="make the words stronger instead")
    suppress.add_argument(
        "--reencode", action="store_true", help="take the other words' rows from the prompt without these words"
    )
    suppress.set_defaults(run=_suppress)
    edit = commands.add_parser("edit", help="the picture of a prompt, changed into that of another, side by side")
    edit.add_argument("--source", required=True, help="the prompt of the picture")
    edit.add_argument("--target", required=True, help="the prompt of the changed picture")
    edit.add_argument("--cross", type=finite, default=0.8, help="share of the steps with the source's word maps")
    edit.add_argument("--self", type=finite, default=0.4, dest="self_", help="the same among the pixels")
    edit.add_argument("--blend", nargs=2, metavar="WORD", help="change the picture only where these words are")
    edit.add_argument("--image", type=Path, help="a real picture that the source prompt describes")
    edit.add_argument("--inversion", choices=_INVERSIONS, help="how --image is inverted; default: direct")
    edit.set_defaults(run=_edit)
    for command, name in ((suppress, "suppressed.png"), (edit, "edited.png")):
        command.add_argument("--model", help="folder in Diffusers format, or a hub id; default: the embedded model")
        command.add_argument("--steps", type=positive, default=50)
        command.add_argument("--guidance-scale", type=finite, default=7.5)
        command.add_argument("--seed", type=seed, default=0)
        command.add_argument("--device", help="default: cuda where there is one, else cpu")
        command.add_argument("--out", type=Path, default=Path(name))


def _suppress(arguments: argparse.Namespace) -> int:
    from .. import Suppression, patched, suppress

    if arguments.optimise and arguments.strengthen:
        raise ValueError("--optimise suppresses words; it cannot be had with --strengthen")
    if arguments.strengthen and arguments.reencode:
        raise ValueError("words that are strengthened stay in the others' rows; leave out --strengthen or --reencode")
    check_writable(arguments.out)
    pipe = _load(arguments)
    with patched(pipe, "exact"):
        before = pipe(arguments.prompt, **_options(arguments)).images[0]
    if arguments.optimise:
        method = Suppression(arguments.words, step_size=arguments.step_size, reencode=arguments.reencode)
        with patched(pipe, "exact", steering=method):
            after = pipe(arguments.prompt, **_options(arguments)).images[0]
    else:
        how = {"strengthen": arguments.strengthen, "reencode": arguments.reencode}
        with patched(pipe, "exact"):
            after = pipe(**suppress(pipe, arguments.prompt, arguments.words, **how), **_options(arguments)).images[0]
    return _write((before, after), arguments.out)


def _edit(arguments: argparse.Namespace) -> int:
    from PIL import Image

    from .. import edit, invert

    if arguments.inversion is not None and arguments.image is None:
        raise ValueError(f"--inversion {arguments.inversion} needs a picture to invert: --image")
    check_writable(arguments.out)
    pipe = _load(arguments)
    given, inversion = _options(arguments), None
    if arguments.image is not None:
        inversion = invert(
            pipe,
            Image.open(arguments.image),
            arguments.source,
            arguments.inversion or _INVERSIONS[0],
            steps=arguments.steps,
            guidance=arguments.guidance_scale,
        )
        given |= inversion.arguments
    options = {"cross": arguments.cross, "self_": arguments.self_, "inversion": inversion}
    if arguments.blend is not None:
        options["blend"] = tuple(arguments.blend)
    with edit(pipe, arguments.source, arguments.target, **options) as edited:
        return _write(pipe(edited.prompts, **given).images, arguments.out)


def _load(arguments: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from .. import models

    device = choose_device(arguments.device)
    with terminal.console.status("loading the model"):
        if arguments.model is None:
            pipe = models.embedded_pipeline()
        else:
            pipe = DiffusionPipeline.from_pretrained(arguments.model)
    return pipe.to(device, torch.float16 if device.startswith("cuda") else torch.float32)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(arguments.seed),
    }


def _write(pictures: Any, path: Path) -> int:
    sheet = join(pictures)
    with write_whole(path) as part:
        sheet.save(part)
    say(f"written: {path}")
    return 0


def join(pictures: Any) -> Image:
    """Return pictures of one size side by side."""
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place * width, 0))
    return sheet
