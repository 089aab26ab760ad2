"""What was measured of rows of steps, kept in tune's file beside the measurements of candidates."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import lock_file, write_whole
from .cache import make_error, read_file, shorten


@dataclass
class PromptCosts:
    """What was measured on one prompt, or one batch of prompts.

    Attributes:
        local: squared errors of the latents right behind a row, an image each, by "kind key length".
        followed: (squared error behind a row, the same at the end), an image each, by the step behind the row.
        seconds: of one step, by kind.
    """

    local: dict[str, list[float]] = field(default_factory=dict)
    followed: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Profiles:
    """Costs by prompt, written to a file after each prompt; several processes may share the file.

    Args:
        path: of the file; None: none is kept.
        key: from :func:`difffast.tuning.cache.identify`.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: str | Path | None, key: str) -> None:
        self._path, self._key = None if path is None else Path(path), f"{key} profiles"
        self._known = {} if self._path is None else _read(self._path, read_file(self._path), self._key)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._known

    def __getitem__(self, prompt: str) -> PromptCosts:
        return self._known[prompt]

    def add(self, prompt: str, costs: PromptCosts) -> None:
        """Keep what was measured on a prompt; if the file cannot be written, there is a warning."""
        self._known[prompt] = costs
        if self._path is None:
            return
        try:
            with lock_file(self._path):
                content = read_file(self._path)
                known = {**_read(self._path, content, self._key), **self._known}
                mine = {each: asdict(known[each]) for each in known}
                with write_whole(self._path) as part:
                    part.write_text(json.dumps({**content, self._key: mine}, indent=1), encoding="utf-8")
        except (OSError, ValueError) as error:
            warnings.warn(f"difffast: the profile is kept in memory only: {error}", stacklevel=3)


def _read(path: Path, content: Mapping[str, Any], key: str) -> dict[str, PromptCosts]:
    """Return the profiles of one key, every number of which has been looked at."""
    given = content.get(key, {})
    if not isinstance(given, dict):
        raise make_error(path, f"no object under {key}: {shorten(given)}")
    found = {}
    for prompt, costs in given.items():
        try:
            local = {name: [float(each) for each in some] for name, some in costs["local"].items()}
            followed = {name: [(float(a), float(b)) for a, b in some] for name, some in costs["followed"].items()}
            seconds = {name: float(each) for name, each in costs["seconds"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise make_error(path, f"no profile under {key}, {prompt!r}: {shorten(costs)}") from None
        found[prompt] = PromptCosts(local, followed, seconds)
    return found
