"""What the processes do that tests/test_distributed*.py start."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import unets

import difffast
from difffast.distributed.launch import join_processes
from difffast.engines import programs

PROMPTS = ("a red circle", "a hat")


@dataclass(frozen=True)
class Case:
    """One call of a tiny pipeline.

    Attributes:
        mesh: sizes by dimension; none: one process.
        options: of difffast.patch.
        steps: how many.
        more: arguments of the call.
        shared: options of difffast.patch that need a mesh.
        backend: what compiles programs; "eager" traces them and generates no code.
    """

    mesh: Mapping[str, int]
    options: Mapping[str, Any]
    steps: int = 10
    more: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    backend: str = programs.BACKEND


def build() -> Any:
    """Return the tiny pipeline, with the same random weights in every process."""
    pipe = difffast.models.tiny_pipeline("sd", channels=(32, 64), sample_size=8)
    pipe.unet = unets.make_small()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str, steps: int, seed: int = 3, **more: Any) -> np.ndarray:
    """Return the images [N, H, W, 3] of a prompt, in 0 .. 1."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **more).images


def draw_alone(case: Case, prompt: str = PROMPTS[0]) -> np.ndarray:
    """Return what one process makes of a case."""
    pipe = build()
    with mock.patch.object(programs, "BACKEND", case.backend), difffast.patched(pipe, **case.options):
        return draw(pipe, prompt, case.steps, **case.more)


@contextlib.contextmanager
def joined(timeout_s: float = 120.0) -> Iterator[None]:
    """Join the other processes on gloo."""
    with join_processes("cpu", timeout_s):
        yield


def make_mesh(sizes: Mapping[str, int]) -> Any:
    """Return a mesh on gloo."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def draw_all(cases: Sequence[Case]) -> list[tuple[np.ndarray, dict[str, int], list[int], str]]:
    """Return of each case: images, what was exchanged, sizes of decoder batches, the report and the run as text."""
    found = []
    with joined(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "difffast: every process runs both of guidance's halves: guidance is off")
        pipe = build()
        for case in cases:
            mesh = make_mesh(case.mesh)
            prompt = PROMPTS[mesh.get_local_rank("dp")] if "dp" in case.mesh else PROMPTS[0]
            compiled = mock.patch.object(programs, "BACKEND", case.backend)
            with compiled, difffast.patched(pipe, mesh=mesh, **case.options, **case.shared) as report:
                images = draw(pipe, prompt, case.steps, **case.more)
                run = report.last_run
                found.append((images, dict(run.exchanged), run.decode_batches, f"{report}\n{run}"))
    return found


def patch_unlike(change: str) -> str:
    """Return how patching is refused where process 1 is not like the others, or what the run says of its latents."""
    with joined():
        pipe = build()
        rank = torch.distributed.get_rank()
        if change == "weights" and rank == 1:
            with torch.no_grad():
                pipe.unet.conv_out.bias[1] += 1e-3
        if change == "order" and rank == 1:  # the same numbers in other places
            with torch.no_grad():
                bias = pipe.vae.decoder.conv_in.bias
                bias[[0, 1]] = bias[[1, 0]]
        if change == "channels" and rank == 1:
            pipe = difffast.models.tiny_pipeline("sd", channels=(32, 32), sample_size=8)
            pipe.set_progress_bar_config(disable=True)
        mesh = make_mesh({"cfg": 2})
        preset = "turbo" if change == "options" and rank == 1 else "exact"
        try:
            with difffast.patched(pipe, preset, mesh=mesh):
                draw(pipe, PROMPTS[0], 2, seed=rank if change == "seed" else 0)
        except (ValueError, ConnectionError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"


def refuse(sizes: Mapping[str, int], preset: str, options: Mapping[str, Any]) -> str:
    """Return how patching with a mesh is refused."""
    with joined():
        pipe = build()
        try:
            difffast.patch(pipe, preset, mesh=make_mesh(sizes), **options)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"


def draw_lost(how: str, timeout_s: float) -> tuple[str, float]:
    """Return how a run ends whose other process is killed at step 3, or hangs, and after how many seconds."""
    with joined(timeout_s):
        pipe = build()
        difffast.patch(pipe, "exact", mesh=make_mesh({"cfg": 2}))
        times = []

        def stop(_pipe: Any, step: int, _time: Any, tensors: Any) -> Any:
            if step == 3:
                if torch.distributed.get_rank() == 1:
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(2 * timeout_s)
                times.append(time.monotonic())
            return tensors

        try:
            draw(pipe, PROMPTS[0], 10, callback_on_step_end=stop)
        except ConnectionError as error:
            return str(error), time.monotonic() - times[0]
    return "nothing", 0.0


def draw_with_guidance_to_step(last: int, ranks: Sequence[int]) -> str:
    """Return how a run ends in which guidance is on up to a step alone, in some processes."""
    with joined():
        pipe = build()
        difffast.patch(pipe, "exact", mesh=make_mesh({"cfg": 2}))

        def turn_off(pipe: Any, step: int, _time: Any, tensors: Any) -> Any:
            if step == last and torch.distributed.get_rank() in ranks:
                pipe._guidance_scale = 1.0
                return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
            return tensors

        watch = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        try:
            draw(pipe, PROMPTS[0], 6, **watch)
        except (ValueError, ConnectionError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"


def patch_unlike_in_a_grid() -> str:
    """Return how patching is refused where process 3 of 2 x 2 has other weights, which process 0 never sees."""
    with joined():
        pipe = build()
        if torch.distributed.get_rank() == 3:
            with torch.no_grad():
                pipe.unet.conv_in.bias[0] += 1
        try:
            difffast.patch(pipe, "exact", mesh=make_mesh({"dp": 2, "cfg": 2}))
        except ValueError as error:
            return str(error)
        return "nothing"
