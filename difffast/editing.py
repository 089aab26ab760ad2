"""edit: pictures of a changed prompt that stay what they were elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .patch import patched
from .sampling.extension import Method
from .sites import find_site
from .steering.editing.method import PromptEdit
from .steering.inversion.inversion import Inversion

if TYPE_CHECKING:
    from .support import Pipeline


@contextlib.contextmanager
def edit(
    pipe: Pipeline,
    source: str,
    target: str,
    *,
    cross: float = 0.8,
    self_: float = 0.4,
    reweight: Mapping[str, float] | None = None,
    blend: tuple[str, str] | None = None,
    inversion: Inversion | None = None,
    **more: Any,
) -> Iterator[PromptEdit]:
    """Change the picture of one prompt into that of another while the block lasts: Prompt-to-Prompt.

    ``with difffast.edit(pipe, "a cat on a sofa", "a dog on a sofa") as edited:
    before, after = pipe(edited.prompts).images``

    The pipeline is called with both prompts, and makes both pictures from the same noise.  A pipeline that is not
    patched is patched with the preset "exact" inside the block; what was patched before comes back after it.

    Args:
        pipe: a pipeline that :func:`difffast.patch` supports, with attention to the text alone.
        source, target, cross, self_, reweight, blend: see :class:`~difffast.steering.editing.config.EditConfig`.
        inversion: of a real picture, whose prompt ``source`` is; call the pipeline with ``**inversion.arguments`` then.
        more: its other fields: ``kind``, ``uncond_self``, ``values``, ``blend_threshold``, ``blend_from``, ``mode``.

    Yields:
        The edit, with its ``prompts``.

    Raises:
        TypeError: there is no such field, or a value has the wrong type.
        ValueError: a value out of range, prompts that cannot be mapped, or a pipeline that cannot be edited; while the
            pipeline runs, other prompts than the edit's.
    """
    method = PromptEdit(source, target, cross=cross, self_=self_, reweight=reweight, blend=blend, **more)
    if inversion is not None and not isinstance(inversion, Inversion):
        raise TypeError(f"inversion must be what difffast.invert returns, got {type(inversion).__name__}")
    if inversion is not None and inversion.prompt != source:
        raise ValueError(f"the inversion is of {inversion.prompt!r}, and the source of the edit is {source!r}")
    methods: tuple[Method, ...] = (method,)
    if inversion is not None:  # attention is edited by one method, which then has the other's values as well
        methods = (method.inject(inversion),) if inversion.method == "style" else (inversion, method)
    site = find_site(pipe)
    options = {"preset": "exact"} if site is None else site.options.as_arguments()
    with patched(pipe, **{**options, "steering": (*options.get("steering", ()), *methods)}):
        yield method
