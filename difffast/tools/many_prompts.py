"""``difffast generate --prompts``: a picture for every line of a file, by one process or by many."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, write_whole
from . import terminal
from .arguments import choose_device, positive_seconds
from .prompt_files import MANIFEST, Job, Manifest, check_lengths, read_prompts
from .terminal import say

if TYPE_CHECKING:
    from ..distributed.launch import Replicas


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that many prompts have besides those of one."""
    parser.add_argument(
        "--mesh", help="under torchrun: how processes share the work, such as dp=2,cfg=2; default: each has prompts"
    )
    parser.add_argument(
        "--timeout", type=positive_seconds, default=1800.0, help="seconds that a process waits for the others"
    )


def generate_many(arguments: argparse.Namespace) -> int:
    """Make what is missing of the pictures; returns the exit status, 1 where some failed."""
    prompts = read_prompts(arguments.prompts)
    folder = arguments.out or Path("out/pictures")
    check_writable(folder / MANIFEST)
    device = choose_device(_name_device(arguments.device))
    dtype = arguments.dtype or ("float16" if device.startswith("cuda") else "float32")
    settings = {
        "model": arguments.model,
        "preset": arguments.preset,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "negative_prompt": arguments.negative_prompt,
        "dtype": dtype,
    }
    jobs = [Job(line, prompt, arguments.seed + line - 1, settings) for line, prompt in enumerate(prompts, 1)]
    with _join(arguments, device) as replicas:
        pipe = _load(arguments, device, dtype, replicas)
        check_lengths(arguments.prompts, prompts, getattr(pipe, "tokenizer", None))
        return _Maker(pipe, arguments, Manifest(folder), folder, replicas).run(jobs)


def _name_device(asked: str | None) -> str | None:
    """Return the device of this process: each of several on one machine has its own GPU."""
    import torch

    place = os.environ.get("LOCAL_RANK")
    if place is not None and asked in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(place))
        return f"cuda:{place}"
    return asked


@contextlib.contextmanager
def _join(arguments: argparse.Namespace, device: str) -> Iterator[Replicas | None]:
    """Join the other processes, if there are any; one process alone needs nothing distributed."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        if arguments.mesh is not None:
            raise ValueError(f"--mesh {arguments.mesh} needs processes that torchrun has started, and there is one")
        yield None
        return
    from ..distributed.launch import Replicas, join_processes
    from ..distributed.meshes import parse_mesh

    sizes = parse_mesh(arguments.mesh, processes)
    if arguments.preset == "stock" and set(sizes) != {"dp"}:
        raise ValueError(
            f"stock pipelines are made by one process each: --mesh must be dp={processes}, got {arguments.mesh}"
        )
    with join_processes(device, arguments.timeout):
        yield Replicas(sizes, device)


def _load(arguments: argparse.Namespace, device: str, dtype: str, replicas: Replicas | None) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from ..patch import patch

    # Cast after loading: the name of from_pretrained's dtype argument differs between Diffusers versions.
    pipe = DiffusionPipeline.from_pretrained(arguments.model).to(device, getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    if arguments.preset != "stock":
        report = patch(pipe, arguments.preset, **({} if replicas is None else {"mesh": replicas.mesh}))
        if _is_first():
            say(report)
    return pipe


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Maker:
    """Makes pictures, and writes down what came out."""

    def __init__(
        self, pipe: Any, arguments: argparse.Namespace, manifest: Manifest, folder: Path, replicas: Replicas | None
    ) -> None:
        self._pipe, self._arguments, self._manifest = pipe, arguments, manifest
        self._folder, self._replicas = folder, replicas

    def run(self, jobs: Sequence[Job]) -> int:
        """Make the jobs of this process that are not made yet; returns the exit status of the command."""
        replicas, made = self._replicas, self._manifest.find_made()
        missing = [job for job in jobs if job.file not in made]
        if replicas is not None:
            missing = replicas.share(missing, "which pictures are missing")
        mine = missing if replicas is None else missing[replicas.place :: replicas.count]
        with terminal.make_progress(disable=not _is_first()) as progress:
            task = progress.add_task(f"{len(jobs)} pictures", total=len(jobs), completed=len(jobs) - len(missing))
            failed = []
            for job in mine:
                error = self._make(job)
                if error is not None:
                    failed.append((job, error))
                progress.update(task, completed=self._manifest.count_made(jobs))
            writes = replicas is None or replicas.writes
            failures = failed if writes else []
            if replicas is not None:
                found = replicas.collect(failures, "which pictures failed")
                failures = sorted((each for part in found for each in part), key=lambda each: each[0].line)
            progress.update(task, completed=len(jobs) - len(failures))
        there = len(jobs) - len(missing)
        if _is_first():
            for job, error in failures:
                say(f"failed: line {job.line}, {job.prompt!r}: {error}")
            say(
                f"{len(missing) - len(failures)} pictures made, {len(failures)} failed, {there} were there; "
                f"written: {self._folder / MANIFEST}"
            )
        return 1 if failures else 0

    def _make(self, job: Job) -> str | None:
        """Make one picture; returns why it failed, or None."""
        image = error = None
        start = time.perf_counter()
        try:
            image = self._draw(job)
        except ConnectionError:
            raise  # another process is lost: nothing more can be made together
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        seconds = time.perf_counter() - start
        if self._replicas is not None:
            self._replicas.agree(error is not None)
            if not self._replicas.writes:
                return error
        if error is None:
            with write_whole(self._folder / job.file) as part:
                image.save(part)
            self._manifest.add({**job.describe(), "file": job.file, "seconds": round(seconds, 3)})
        else:
            self._manifest.add({**job.describe(), "error": error, "seconds": round(seconds, 3)})
        return error

    def _draw(self, job: Job) -> Any:
        import torch

        return self._pipe(
            job.prompt,
            negative_prompt=self._arguments.negative_prompt,
            num_inference_steps=self._arguments.steps,
            guidance_scale=self._arguments.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
        ).images[0]
