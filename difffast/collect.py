"""Attention maps of a run, collected through the same protocol as any method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .layers.context import MapSink
from .layers.maps import AttentionMaps, choose_layers
from .patch import patched
from .sampling.extension import Extension, RunInfo
from .sites import find_site
from .target import Target

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class MapCollection(Extension):
    """Fills attention maps during a pipeline's runs.

    Args:
        maps: what is filled.
    """

    stays = True

    def __init__(self, maps: AttentionMaps) -> None:
        self._maps = maps

    def map_sinks(self) -> Sequence[MapSink]:
        return (self._maps,)

    def begin(self, info: RunInfo) -> None:
        self._maps.reset()


@contextlib.contextmanager
def collect_maps(
    pipe: DiffusionPipeline, *, layers: str | Sequence[str] | None = None, tokens: Sequence[int] | None = None
) -> Iterator[AttentionMaps]:
    """Collect head-averaged cross-attention maps while a pipeline runs, without ever storing per-head maps.

    A pipeline that is not patched is patched with the preset "exact" inside the block.

    Args:
        pipe: a pipeline that :func:`difffast.patch` supports.
        layers: names of the UNet's cross-attention layers, or shell-style patterns such as ``"up_blocks.1.*"``; None
            means all.  DeepFloyd IF's layers attend to text and pixels at once: the maps of its words add up to less
            than 1.
        tokens: positions in the tokenised prompt, 0 being the start token; None means all.

    Yields:
        The :class:`AttentionMaps`.  Each new image empties them first.

    Raises:
        ValueError: no such layer, bad tokens, or a pipeline that cannot be patched.
        RuntimeError: (while the pipeline runs) a chosen layer cannot be fused, with the reason.
    """
    if tokens is not None:
        tokens = tuple(tokens)
        if not tokens or any(type(token) is not int or token < 0 for token in tokens):
            raise ValueError(f"tokens must be at least one int of at least 0 (or None), got {tokens}")
    target = Target.of(pipe)
    if target.denoiser.text != "given":
        raise ValueError(
            f"no attention maps can be collected from a {type(target.unet).__name__}: its layers get the text "
            f"{target.denoiser.text}, which leaves no map a picture"
        )
    maps = AttentionMaps(choose_layers(target.unet, layers), tokens)
    collection = MapCollection(maps)
    with contextlib.ExitStack() as stack:
        if find_site(pipe) is None:
            stack.enter_context(patched(pipe, "exact"))
        find_site(pipe).settings.extensions += (collection,)
        try:
            yield maps
        finally:
            site = find_site(pipe)
            if site is not None:
                settings = site.settings
                settings.extensions = tuple(each for each in settings.extensions if each is not collection)
