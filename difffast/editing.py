"""edit: pictures of a changed prompt that stay what they were elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .patch import patched
from .sites import find_site
from .steering.editing.method import PromptEdit

if TYPE_CHECKING:
    from .support import Pipeline


@contextlib.contextmanager
def edit(
    pipe: Pipeline,
    source: str,
    target: str,
    *,
    kind: Literal["replace", "refine"] | None = None,
    cross: float = 0.8,
    self_: float = 0.4,
    reweight: Mapping[str, float] | None = None,
    blend: tuple[str, str] | None = None,
    **more: Any,
) -> Iterator[PromptEdit]:
    """Change the picture of one prompt into that of another while the block lasts: Prompt-to-Prompt.

    ``with difffast.edit(pipe, "a cat on a sofa", "a dog on a sofa") as edited:
    before, after = pipe(edited.prompts).images``

    The pipeline is called with both prompts, and makes both pictures from the same noise.  A pipeline that is not
    patched is patched with the preset "exact" inside the block; what was patched before comes back after it.

    Args:
        pipe: a pipeline that :func:`difffast.patch` supports, with attention to the text alone.
        source, target, kind, cross, self_, reweight, blend: see :class:`~difffast.steering.editing.config.EditConfig`.
        more: its other fields: ``uncond_self``, ``blend_threshold``, ``blend_from``, ``mode``.

    Yields:
        The edit, with its ``prompts``.

    Raises:
        TypeError: there is no such field, or a value has the wrong type.
        ValueError: a value out of range, prompts that cannot be mapped, or a pipeline that cannot be edited; while the
            pipeline runs, other prompts than the edit's.
    """
    method = PromptEdit(source, target, kind=kind, cross=cross, self_=self_, reweight=reweight, blend=blend, **more)
    site = find_site(pipe)
    options = {"preset": "exact"} if site is None else site.options.as_arguments()
    with patched(pipe, **{**options, "steering": (*options.get("steering", ()), method)}):
        yield method
