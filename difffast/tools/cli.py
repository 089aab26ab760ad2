"""The command line: ``difffast COMMAND``; ``difffast --help`` lists the commands."""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from ..files import check_writable, write_whole
from ..presets import PRESETS
from ..steering.binding.config import PRESETS as BINDING_PRESETS
from . import editing, erasing, many_prompts, proving, terminal
from .arguments import choose_device, finite, positive, seed
from .info import show_info
from .terminal import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ArithmeticError, ValueError, TypeError, OSError) as error:
        terminal.console.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except RuntimeError as error:
        from ..ops._dispatch import CannotRunError

        if not isinstance(error, CannotRunError):
            raise
        terminal.console.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        say("interrupted: no file was left half written.")
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="difffast", description="Faster Diffusers UNet pipelines.")
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices, and each backend with the reason where it is missing")
    info.add_argument("--pipeline", type=Path, metavar="DIR", help="whether a pipeline on disk is supported")
    info.add_argument("--pipelines", action="store_true", help="all pipelines that are supported")
    info.set_defaults(run=show_info)

    proving.add_parser(commands)

    demo = commands.add_parser("demo", help="the embedded model, stock against patched: images, seconds, PSNR, plan")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for grid.png and demo.json")
    demo.add_argument("--steps", type=positive, default=50)
    demo.add_argument("--seeds", type=positive, default=2, help="how many seeds per prompt")
    demo.add_argument("--preset", choices=sorted(PRESETS), default="balanced")
    demo.add_argument(
        "--binding", choices=sorted(BINDING_PRESETS), help="instead: semantic binding, in binding.png, with its maps"
    )
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="images from your own checkpoint")
    generate.add_argument("--model", required=True, help="folder in Diffusers format, or a hub id")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, each with the next seed; resumable")
    generate.add_argument("--negative-prompt")
    generate.add_argument("--preset", choices=[*sorted(PRESETS), "stock"], default="balanced")
    generate.add_argument("--out", type=Path, help="default: image.png; with --prompts a folder, out/pictures")
    generate.add_argument("--steps", type=positive, default=50)
    generate.add_argument("--guidance-scale", type=finite, default=7.5)
    generate.add_argument("--seed", type=seed, default=0)
    generate.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA")
    generate.add_argument("--device", help="default: cuda where there is one, else cpu")
    many_prompts.add_arguments(generate)
    generate.set_defaults(run=_generate)

    editing.add_parsers(commands)
    erasing.add_parsers(commands)

    # Its options are those of the checkout's bench/run.py: with no prefix of options of its own, all are forwarded.
    bench = commands.add_parser(
        "bench", help="everybody in turn: tables, charts, a page; needs a checkout", prefix_chars="\0", add_help=False
    )
    bench.add_argument("forwarded", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_bench)

    profile = commands.add_parser("profile", help="one image: Perfetto trace, time and operators per block")
    profile.add_argument("--model", help="folder in Diffusers format; default: the embedded model")
    profile.add_argument("--preset", choices=[*sorted(PRESETS), "stock"], default="balanced")
    profile.add_argument("--prompt", default="a red triangle above a dotted purple circle")
    profile.add_argument("--steps", type=positive, default=50)
    profile.add_argument("--device", help="default: cuda where there is one, else cpu")
    profile.add_argument("--out", type=Path, default=Path("out/profile"), help="folder for trace.json")
    profile.set_defaults(run=_profile)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .. import models
    from . import demo

    if arguments.binding is not None:
        return _binding_demo(arguments)
    grid, numbers = arguments.out / "grid.png", arguments.out / "demo.json"
    for path in (grid, numbers):
        check_writable(path)
    with terminal.console.status("loading the embedded model"):
        pipe = models.embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seeds = range(arguments.seeds)
    images = 1 + 2 * len(demo.PROMPTS) * len(seeds)
    with terminal.make_progress() as progress:
        task = progress.add_task(f"{images} images, {arguments.steps} steps each", total=images * arguments.steps)
        results, report = demo.compare(
            pipe,
            demo.PROMPTS,
            seeds,
            steps=arguments.steps,
            preset=arguments.preset,
            on_step=lambda: progress.advance(task),
        )
    demo.draw_grid(results, grid)
    demo.write_json(results, numbers, steps=arguments.steps, preset=arguments.preset, model="the embedded model")

    say(report)
    say(report.plan(report.last_run.total))
    terminal.console.print(_comparison_table(results))
    say(f"written: {grid}, {numbers}")
    return 0


def _binding_demo(arguments: argparse.Namespace) -> int:
    from .. import SemanticBinding, models
    from . import binding_demo

    grid = arguments.out / "binding.png"
    check_writable(grid)
    with terminal.console.status("loading the embedded model"):
        pipe = models.embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seeds = range(arguments.seeds)
    images = 2 * len(binding_demo.PROMPTS) * len(seeds)
    with terminal.make_progress() as progress:
        task = progress.add_task(f"{images} images, {arguments.steps} steps each", total=images * arguments.steps)
        results = binding_demo.compare(
            pipe,
            binding_demo.PROMPTS,
            seeds,
            SemanticBinding(arguments.binding, **binding_demo.EMBEDDED),
            steps=arguments.steps,
            preset=arguments.preset,
            on_step=lambda: progress.advance(task),
        )
    words = binding_demo.explain(arguments.binding)
    binding_demo.draw_grid(results, grid, words)
    say(results[0].trace)
    say(words)
    say(f"written: {grid}")
    return 0


def _comparison_table(results: Sequence[Any]) -> Table:
    table = Table("prompt", "seed", "stock s", "difffast s", "speed-up", "PSNR dB", title="whole pipeline call")
    for r in results:
        table.add_row(
            r.prompt, str(r.seed), f"{r.stock_s:.2f}", f"{r.patched_s:.2f}", f"{r.speedup:.2f}x", f"{r.psnr_db:.1f}"
        )
    stock, fast, speedup, psnr = (
        statistics.median(getattr(r, name) for r in results) for name in ("stock_s", "patched_s", "speedup", "psnr_db")
    )
    table.add_section()
    table.add_row("median", "", f"{stock:.2f}", f"{fast:.2f}", f"{speedup:.2f}x", f"{psnr:.1f}")
    return table


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.prompts is not None:
        return many_prompts.generate_many(arguments)
    if arguments.mesh is not None:
        raise ValueError(f"--mesh {arguments.mesh} is for --prompts: one prompt is made by one process")
    return _generate_one(arguments, arguments.out or Path("image.png"))


def _generate_one(arguments: argparse.Namespace, out: Path) -> int:
    import torch
    from diffusers import DiffusionPipeline

    from ..patch import patch

    _check_picture(out)
    device = choose_device(arguments.device)
    dtype = arguments.dtype or ("float16" if device.startswith("cuda") else "float32")
    # Cast after loading: the name of from_pretrained's dtype argument differs between Diffusers versions.
    pipe = DiffusionPipeline.from_pretrained(arguments.model).to(device, getattr(torch, dtype))
    report = None
    if arguments.preset != "stock":
        report = patch(pipe, arguments.preset)
        say(report)
    start = time.perf_counter()
    image = pipe(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(arguments.seed),
    ).images[0]
    seconds = time.perf_counter() - start
    with write_whole(out) as part:
        image.save(part)
    if report is not None:
        say(report.last_run)
    say(f"{seconds:.2f} s, written: {out}")
    return 0


def _check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written before the time for it is spent.

    Raises:
        ValueError: no picture format has this extension.
        OSError: the folder cannot be made, or the file not be written.
    """
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out must end as a picture does (.png, .jpg, ...), got {path}")
    check_writable(path)


def _bench(arguments: argparse.Namespace) -> int:
    import difffast

    script = Path(difffast.__file__).resolve().parents[1] / "bench" / "run.py"
    if not script.is_file():
        raise ValueError(f"difffast bench needs a checkout of the repository: there is no {script}")
    return subprocess.run([sys.executable, str(script), *arguments.forwarded]).returncode


def _profile(arguments: argparse.Namespace) -> int:
    import contextlib

    import torch

    from .. import models
    from ..patch import patched
    from .profiling import profile

    trace = arguments.out / "trace.json"
    check_writable(trace)
    device = choose_device(arguments.device)
    pipe = models.load_pipeline(arguments.model) if arguments.model else models.embedded_pipeline()
    pipe = pipe.to(device, torch.float16 if device.startswith("cuda") else torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        pipe(arguments.prompt, num_inference_steps=arguments.steps, generator=generator)

    preset = arguments.preset
    with contextlib.nullcontext() if preset == "stock" else patched(pipe, preset), terminal.console.status("profiling"):
        found = profile(pipe, generate, trace)
    table = Table(Column("block", no_wrap=True), "calls", "host ms", "device ms", "operators", "launches", "syncs")
    for row in found.blocks:
        cells = (row.calls, f"{1e3 * row.host_s:.1f}", f"{1e3 * row.device_s:.1f}", row.operators, row.launches)
        table.add_row(row.name, *map(str, cells), str(row.synchronisations))
    terminal.console.print(table)
    say(f"written: {found.trace} (open in https://ui.perfetto.dev)")
    if found.synchronisations and preset != "stock":
        text = f"{found.synchronisations} synchronisations inside UNet calls, expected none"
        terminal.console.print(text, style="bold red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
