"""The terminal that the commands print to."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


def say(text: object) -> None:
    """Print a text that may come from the user or from a file: nothing in it is markup."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def make_progress(*, disable: bool = False) -> Progress:
    """Return a progress bar with times; a disabled one shows nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
