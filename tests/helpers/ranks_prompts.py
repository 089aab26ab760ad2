"""What the processes do that tests/test_many_prompts.py starts."""

from __future__ import annotations

import io
import os
import signal
from typing import Any

from diffusers import StableDiffusionPipeline
from rich.console import Console

from difffast.tools import cli, terminal


def generate(*options: str, broken: str | None = None, killed: tuple[int, str] | None = None) -> tuple[int, str]:
    """Return the status of ``difffast generate`` and what it prints.

    Args:
        options: of the command.
        broken: a prompt that the pipeline cannot draw.
        killed: a process, and the prompt at which it ends at once.
    """
    plain = StableDiffusionPipeline.__call__

    def call(self: Any, prompt: str, *args: Any, **kwargs: Any) -> Any:
        if prompt == broken:
            raise RuntimeError("this prompt cannot be drawn")
        if killed == (int(os.environ.get("RANK", "0")), prompt):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, prompt, *args, **kwargs)

    console, terminal.console = terminal.console, Console(file=io.StringIO(), width=300)
    StableDiffusionPipeline.__call__ = call
    try:
        status = cli.main(["generate", "--steps", "2", "--device", "cpu", "--preset", "exact", *options])
        return status, terminal.console.file.getvalue()
    finally:
        StableDiffusionPipeline.__call__, terminal.console = plain, console


def generate_alone(*options: str) -> tuple[int, str]:
    """Return what :func:`generate` does in a process that knows of no others."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    return generate(*options)


def generate_killed(options: tuple[str, ...], rank: int, prompt: str) -> tuple[int, str]:
    """Return what :func:`generate` does where one process ends at a prompt."""
    return generate(*options, killed=(rank, prompt))


def generate_broken(options: tuple[str, ...], prompt: str) -> tuple[int, str]:
    """Return what :func:`generate` does where one prompt cannot be drawn."""
    return generate(*options, broken=prompt)
