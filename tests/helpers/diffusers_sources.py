"""What the installed Diffusers has, read from its sources: what wants packages that are not here cannot hide."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import diffusers

#: The head of a class, or of its ``__init__``; parsing the whole of such long files takes seconds.
_HEAD = re.compile(r"^class (\w+)\(([^)]*)\):|^    def __init__\((.*?)\)(?: -> None)?:$", re.MULTILINE | re.DOTALL)


#: Pipelines that some of the supported versions of Diffusers do not have: the first and the last that has them.
NOT_ALWAYS: dict[str, tuple[str | None, str | None]] = {
    "DreamLitePipeline": ("0.39.0", None),
    "DreamLiteMobilePipeline": ("0.39.0", None),
    "StableDiffusionKDiffusionPipeline": (None, "0.36.0"),
    "StableDiffusionXLKDiffusionPipeline": (None, "0.36.0"),
}


def exists(name: str) -> bool:
    """Return whether the installed version of Diffusers is one of those that have a pipeline."""
    first, last = NOT_ALWAYS.get(name, (None, None))
    here = _parse(diffusers.__version__)
    return (first is None or here >= _parse(first)) and (last is None or here <= _parse(last))


def _parse(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


@functools.cache
def find_unet_pipelines() -> dict[str, str]:
    """Return every class of pipelines that is made of a UNet, with the arguments of its ``__init__``, as written.

    It is one if its arguments speak of a UNet.  A file that never does cannot call one, and is not read further.
    """
    bases: dict[str, list[str]] = {}
    arguments: dict[str, str] = {}
    for path in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for name, derives, taken in _HEAD.findall(text) if "unet" in text.lower() else ():
            if name:
                current = name
                bases[name] = [base for base in re.findall(r"(\w+)\s*(?:,|$)", derives) if base != name]
                arguments.pop(name, None)  # of a class that this one replaces
            else:
                arguments.setdefault(current, taken)
    found = {}
    for name in sorted(bases):
        line = [name]
        for each in line:  # grows on the way
            line += [base for base in bases.get(each, ()) if base not in line]
        taken = next((arguments[each] for each in line if each in arguments), "")
        if "DiffusionPipeline" in line and "unet" in taken.lower():
            found[name] = taken
    return found
