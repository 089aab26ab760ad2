"""The terminal that the commands print to."""

from __future__ import annotations

from rich.console import Console

console = Console()


def say(text: object) -> None:
    """Print a text that may come from the user or from a file: nothing in it is markup."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)
