"""``difffast prove``: which kernels are right and the fastest on this device."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ..files import check_writable, write_whole
from ..models.configs import UNET_CONFIGS
from . import terminal
from .arguments import choose_device, positive, positive_seconds
from .terminal import say


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    prove = commands.add_parser("prove", help="find out which kernels are right and the fastest on this device")
    what = prove.add_mutually_exclusive_group()
    what.add_argument("--pipeline", type=Path, metavar="DIR", help="the UNet of a pipeline on disk")
    what.add_argument("--model", choices=sorted(UNET_CONFIGS), help="a published UNet (default: sd15)")
    prove.add_argument("--device", help="default: cuda where there is one, else cpu")
    prove.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA")
    prove.add_argument("--batch", type=positive, default=1, help="images at once; guidance doubles it")
    prove.add_argument(
        "--seconds", type=positive_seconds, default=20.0, help="how long it may take (default: %(default)s)"
    )
    prove.add_argument("--refresh", action="store_true", help="prove anew what is known")
    instead = prove.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print what is known, and prove nothing")
    instead.add_argument("--clear", action="store_true", help="delete what is known of the device, and prove nothing")
    instead.add_argument("--report", type=Path, metavar="FILE", help="write everything as JSON, for an issue")
    prove.set_defaults(run=_prove)


def _prove(arguments: argparse.Namespace) -> int:
    import torch

    from ..ops._local import find_path
    from ..proofs.run import complete_device, prove
    from ..proofs.store import clear

    device = complete_device(choose_device(arguments.device))
    if arguments.clear:
        say("cleared." if clear(device) else "there was nothing to clear.")
        return 0
    if arguments.show:
        return _show(device)
    # Refused before the time for them is spent.
    check_writable(find_path(device))
    if arguments.report is not None:
        check_writable(arguments.report)
    unet = None if arguments.pipeline is None else _read_unet(arguments.pipeline)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console) as progress:
        task = progress.add_task("keys", total=None)
        report = prove(
            unet,
            model=None if unet is not None else arguments.model or "sd15",
            device=device,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            batch=arguments.batch,
            seconds=arguments.seconds,
            refresh=arguments.refresh,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    terminal.console.print(make_table(report.proofs, f"proofs on {report.device}"))
    say(report)
    if arguments.report is not None:
        with write_whole(arguments.report) as part:
            part.write_text(json.dumps(report.as_dict(), indent=1, default=str))
        say(f"written: {arguments.report}")
    return 0


def _show(device: Any) -> int:
    """Print what is known of a device."""
    from ..ops import _local

    table = _local.table_of(device)
    if table.note is not None:
        say(f"note: {table.note}")
    if not table.proofs:
        say(f"nothing has been proved on {_local.name_device(device)}: difffast prove does it.")
        return 0
    terminal.console.print(make_table(table.proofs, f"proofs on {_local.name_device(device)}"))
    say(table.path)
    return 0


def make_table(proofs: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Return a table of proofs, whose texts may come from a file."""
    from ..proofs.report import COLUMNS, list_rows

    table = Table(*(Column(name, overflow="fold") for name in COLUMNS), title=escape(title))
    for row in list_rows(proofs):
        table.add_row(*map(escape, row))
    return table


class _Stored:
    """A pipeline on disk of which only the configurations of the UNet and the VAE are read."""

    def __init__(self, unet: Any, vae: Any) -> None:
        self.unet, self.vae = unet, vae


def _read_unet(folder: Path) -> _Stored:
    """Return what :func:`difffast.prove` takes for a pipeline: its UNet, on the meta device.

    Raises:
        ValueError: there is no such pipeline, or its UNet's class is unknown.
    """
    path = folder / "unet" / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no pipeline with a UNet in Diffusers format: there is no {path}")
    vae = folder / "vae" / "config.json"
    return _Stored(_read_config(path, "UNet"), _read_config(vae, "VAE") if vae.is_file() else None)


def _read_config(path: Path, what: str) -> Any:
    """Return the model of a configuration, on the meta device.

    Raises:
        ValueError: it is no configuration, or its class is unknown.
    """
    import diffusers
    import torch

    try:
        config = json.loads(path.read_bytes())
        kind = getattr(diffusers, config["_class_name"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} must be the configuration of a {what} of Diffusers") from None
    with torch.device("meta"):
        return kind.from_config(config)
