"""What one UNet call allows its layers: the only way in which the patched UNet's call speaks to them.

A patched layer that finds no :class:`CallContext` is stock.  What a layer does thus depends on nothing but the call
that it is part of, so that threads and pipelines can share a UNet.  A compiled region cannot look a context up; there
the layers that shall be fused are replaced instead (:mod:`difffast.engines.inputs`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .text_kv import TextKV


class MapSink(Protocol):
    """Somebody who wants attention maps.

    Attributes:
        layers: names of the cross-attention layers whose maps are wanted.
        latest: the maps of the latest step, per layer that has run.
    """

    layers: tuple[str, ...]
    latest: dict[str, Tensor]

    def columns(self, keys: int) -> list[int]:
        """Choose tokens of a text with ``keys`` tokens."""
        ...

    def add(self, layer: str, maps: Tensor, size: tuple[int, int]) -> None:
        """Take maps [B, steps, N, M] of a layer; ``size`` is the latents' (height, width)."""
        ...


@dataclasses.dataclass(frozen=True)
class CrossCall:
    """One call of a cross-attention layer as an edit meets it.

    Attributes:
        layer: the layer.
        name: its name in the UNet.
        query: [B * repeats, H, N, d], by head.
        keys, values: [Bk, H, T, d] of the call's text, where Bk divides B.
        repeats: time steps in the batch; those of one sample are neighbours.
        size: (height, width) of the latents.
        watched: whether attention maps of the layer are wanted, which its own attention hands out.
        attend: returns the attention [b, H, N, d] of given queries to given keys and values.
        project: returns the layer's keys and values [Bk, H, T, d] of another text, from where these are kept.
    """

    layer: Any
    name: str
    query: Tensor
    keys: Tensor
    values: Tensor
    repeats: int
    size: tuple[int, int]
    watched: bool
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    project: Callable[[TextKV], tuple[Tensor, Tensor]]


class AttentionEdit(Protocol):
    """Somebody who changes what attention layers give, before their output projection."""

    def edits_cross(self, name: str) -> bool:
        """Return whether a cross-attention layer is changed."""
        ...

    def attend(self, call: CrossCall, own: Callable[[], Tensor]) -> Tensor:
        """Return what a changed cross-attention layer gives [B * repeats, H, N, d]; ``own`` returns its own."""
        ...

    def share_rows(self, name: str, rows: int, pixels: int) -> Sequence[int] | None:
        """Return, for each of a self-attention layer's rows, that whose queries and keys it takes; None: its own."""
        ...


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a call as its cross-attention layers meet it.

    Attributes:
        seen: the very tensor that layers are given.  A layer that is given another one runs stock.  None: whatever
            layers are given is the text with its rows repeated over frames or pixels.
        original: [B * frames, T, D], before it was repeated for parallel decoding.
        kv: where keys and values are kept; None: nowhere, because gradients are wanted.
        repeats: time steps in the batch, batch-major.
        frames: rows of the text for each sample.
        sink: rows of zeros that ``original`` stands without; they are in the softmax all the same.
    """

    seen: Tensor | None
    original: Tensor
    kv: TextKV | None
    repeats: int = 1
    frames: int = 1
    sink: int = 0


@dataclasses.dataclass(frozen=True)
class CallContext:
    """What one UNet call allows its layers.

    Attributes:
        fused: whether layers use the operators.
        note: is told the reason where a cross-attention layer runs stock, for the report and as a warning.
        record: the same for other layers, for the report alone.
        text: the text that the call is given; None: cross-attention layers run stock.
        sinks: who wants attention maps.
        size: (height, width) of the latents.
        stop: whether the call ends, by :class:`AllCollected`, once every sink has the maps of all its layers.
        only_text: whether cross-attention layers alone are fused.
        always: whether layers are fused even where that does not pay, to see what they would ask for.
        edit: who changes what attention layers give, or None.
        projected: what the UNet has made of the text, which layers attend to instead (:func:`set_projected_text`).
        within: what the call is part of, as a pipeline's call: in it, layers compare all weights with what they have
            made of them once; None: at every call.
    """

    fused: bool
    note: Callable[[str], object]
    record: Callable[[str], object]
    text: Text | None = None
    sinks: Sequence[MapSink] = ()
    size: tuple[int, int] = (0, 0)
    stop: bool = False
    only_text: bool = False
    always: bool = False
    edit: AttentionEdit | None = None
    projected: Text | None = None
    within: object | None = None


class AllCollected(Exception):  # noqa: N818 - no error: it ends a UNet call of which only the maps are wanted
    """Every map that a call was made for has been collected."""


#: The context of the UNet call that is running in this thread.  Layers read it themselves, outside compiled regions
#: only: every layer asks at every call.
CURRENT: ContextVar[CallContext | None] = ContextVar("difffast_call", default=None)


def find_context() -> CallContext | None:
    """Return the context of the UNet call that is running in this thread; None inside compiled regions."""
    return None if torch.compiler.is_compiling() else CURRENT.get()


@contextlib.contextmanager
def use_context(context: CallContext | None) -> Iterator[None]:
    """Let the layers of this thread's UNet calls find ``context`` inside the block; None: they run stock."""
    token = CURRENT.set(context)
    try:
        yield
    finally:
        CURRENT.reset(token)


def repeat_text(text: Any, copy: Any, repeats: int) -> Token[CallContext | None] | None:
    """Let layers be given ``copy``, which is ``text`` repeated ``repeats`` times a row, until :func:`restore_text`.

    No context manager: this runs inside functions that are compiled, where it does nothing.
    """
    context = find_context()
    if context is None or context.text is None or (context.text.seen is not None and context.text.seen is not text):
        return None
    seen = None if context.text.seen is None else copy
    changed = dataclasses.replace(context.text, seen=seen, repeats=repeats * context.text.repeats)
    return CURRENT.set(dataclasses.replace(context, text=changed, projected=None))


def restore_text(token: Token[CallContext | None] | None) -> None:
    """Undo :func:`repeat_text`, which returned ``token``."""
    if token is not None:
        CURRENT.reset(token)


def set_projected_text(context: CallContext, text: Text) -> None:
    """Let the layers of the running call meet what the UNet has made of its text, up to the end of its block."""
    CURRENT.set(dataclasses.replace(context, projected=text))
