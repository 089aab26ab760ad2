"""``difffast info``: versions, devices, kernels with their proofs, and which pipelines are supported."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

from rich.table import Column, Table

from ..presets import PRESETS
from . import terminal
from .proving import make_table
from .terminal import say


def show_info(arguments: argparse.Namespace) -> int:
    """Print what was asked for; returns the exit status."""
    import torch

    from .. import ops
    from ..ops._dispatch import describe_unforced
    from ..ops.linear import advantage

    if arguments.pipeline is not None:
        return _info_pipeline(arguments.pipeline)
    if arguments.pipelines:
        return _info_pipelines()

    table = Table("item", "value", title="difffast info")
    for package in ("difffast", "torch", "triton", "diffusers", "transformers", "accelerate", "peft"):
        table.add_row(package, _version(package))
    table.add_row("python", platform.python_version())
    table.add_row("threads", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            table.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    else:
        build = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
        table.add_row("cuda", f"none: {build}")
    for backend in ops.BACKENDS:
        worth = f", linear layers {advantage():.1f} times as fast as F.linear" if backend == "onednn" else ""
        table.add_row(f"backend {backend}", ops.missing(backend) or f"available{worth}")
    if describe_unforced():
        table.add_row("DIFFFAST_BACKEND", describe_unforced())
    if ops.INSTRUCTION_SET is not None:
        table.add_row("cpp instruction set", ops.INSTRUCTION_SET)
    table.add_row("pipelines", "difffast info --pipelines, or --pipeline DIR")
    table.add_row("presets", "\n".join(PRESETS))
    terminal.console.print(table)
    terminal.console.print(_proof_table())
    terminal.console.print(
        "A kernel without a proving run is never a default; difffast.ops.use_backend or DIFFFAST_BACKEND run it."
    )
    _show_local_proofs()
    return 0


def _info_pipeline(folder: Path) -> int:
    """Say whether a pipeline on disk is supported; status 1 if it is not."""
    import diffusers

    from ..support import UNKNOWN, denoiser_of, support_of

    name, unet = _read_classes(folder / "model_index.json")
    found, kind = getattr(diffusers, name, None), getattr(diffusers, unet, None)
    entry = (support_of(found) if isinstance(found, type) else None) or UNKNOWN
    if entry.exact_only and not (isinstance(kind, type) and denoiser_of(kind)):
        say(f"{name} is not supported: difffast.patch refuses it (difffast info --pipelines lists what it takes).")
        return 1
    if entry.exact_only:
        say(f"{name} can only have what is exact, difffast.patch(pipe, 'exact'): {entry.exact_only}.")
        return 0
    decoders = "several decoders in one batch" if entry.parallel else "one decoder at a time"
    reuse = "and feature reuse" if entry.reuse else "but no feature reuse"
    say(f"{name} is supported: encoder propagation with {decoders}, {reuse}. {entry.note}".rstrip())
    return 0


def _read_classes(index: Path) -> tuple[str, str]:
    """Return the classes that a ``model_index.json`` names: the pipeline's, and its UNet's or an empty string.

    Raises:
        ValueError: there is no such file, or it names none.
    """
    if not index.is_file():
        raise ValueError(f"{index.parent} holds no pipeline in Diffusers format: there is no {index.name}")
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is no JSON that can be read: {error}") from None
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{index} must name the pipeline's class as a string under _class_name, got {name!r}")
    unet = content.get("unet")
    return name, unet[1] if isinstance(unet, list) and len(unet) == 2 and isinstance(unet[1], str) else ""


def _info_pipelines() -> int:
    from ..support import COLUMNS, table

    shown = Table(*(Column(name, overflow="fold") for name in COLUMNS), title="pipelines that difffast patches")
    for row in table():
        shown.add_row(*row)
    terminal.console.print(shown)
    return 0


def _proof_table() -> Table:
    """For every operator and backend, the runs that proved it."""
    from .. import ops
    from ..ops._installed import FROM_PYTORCH, SDPA_KERNELS

    table = Table(Column("operator", no_wrap=True), "backend", "proved on", "dtypes", "by", title="kernels")
    for operator, backends in ops.OPERATORS.items():
        for backend in backends:
            if backend in FROM_PYTORCH:
                table.add_row(operator, backend, "plain PyTorch", "", "")
                continue
            if backend in SDPA_KERNELS:
                table.add_row(operator, backend, "PyTorch's: where a proof finds it faster", "", "")
                continue
            rows = [proof for proof in ops.PROVED if (proof.operator, proof.backend) == (operator, backend)]
            for proof in rows:
                names = sorted(str(dtype).removeprefix("torch.") for dtype in proof.dtypes)
                table.add_row(operator, backend, proof.architecture, ", ".join(names), proof.run)
            if not rows:
                table.add_row(operator, backend, "opt-in, or where a proof finds it faster", "", "")
    return table


def _show_local_proofs() -> None:
    """Print what has been proved on the devices of this machine."""
    import torch

    from ..ops import _local

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        table = _local.table_of(device)
        if table.note is not None:
            say(f"note: {table.note}")
        if table.proofs:
            terminal.console.print(make_table(table.proofs, f"proved here, on {_local.name_device(device)}"))
    if not any(_local.table_of(device).proofs for device in devices):
        say("Nothing has been proved on this machine's own devices yet: difffast prove does it.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
