"""Attention maps of a run, collected through the same protocol as any method."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layers.context import MapSink
from .layers.maps import AttentionMaps, choose_layers
from .patch import patched
from .sampling.extension import Extension, RunInfo
from .sites import find_site
from .steering.prompts import strip_marks
from .surgery.subclass import plain_class
from .target import Target
from .words import Words, convert_text, read_words, tokenizer_apart

if TYPE_CHECKING:
    from .support import Pipeline


class MapCollection(Extension):
    """Fills attention maps during a pipeline's runs.

    Args:
        maps: what is filled.
        target: the pipeline; only a weak reference to it is kept.
    """

    stays = True

    def __init__(self, maps: AttentionMaps, target: Target) -> None:
        self._maps = maps
        self._pipe = weakref.ref(target.pipe)
        self._has_halves = not target.support.guidance
        self._called: dict[int, _Called] = {}  # by thread

    def map_sinks(self) -> Sequence[MapSink]:
        return (self._maps,)

    def see_call(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        site = find_site(pipe)
        marked = site is not None and site.options.binding is not None
        self._called[threading.get_ident()] = _read_call(pipe, args, kwargs, marked=marked)

    def begin(self, info: RunInfo) -> None:
        called = self._called.pop(threading.get_ident(), _Called())
        if called.reason and any(isinstance(each, str) for each in self._maps.tokens or ()):
            raise ValueError(f"words cannot be chosen here: {called.reason}; choose positions")
        guided = getattr(self._pipe(), "do_classifier_free_guidance", called.guided)
        self._maps.reset(called.prompts, guided=self._has_halves and bool(guided))


@dataclass(frozen=True)
class _Called:
    """What a call of a pipeline says of its text.

    Attributes:
        prompts: the words of each prompt.
        reason: why they are not known; "": they are.
        guided: whether its guidance scale asks for guidance.
    """

    prompts: tuple[Words, ...] = ()
    reason: str = "the pipeline's own call, which has the prompt, was not used"
    guided: bool = False


def _read_call(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, marked: bool) -> _Called:
    """Return what the arguments of a call say; wrong arguments are left for the call itself to refuse."""
    try:
        bound = inspect.signature(plain_class(pipe).__call__).bind(pipe, *args, **kwargs)
    except TypeError:
        return _Called()
    bound.apply_defaults()
    given = bound.arguments
    guided = (given.get("guidance_scale") or 0) > 1
    prompt = given.get("prompt")
    if prompt is None:
        return _Called(reason="the pipeline was given no prompt as text", guided=guided)
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
    try:
        texts = [strip_marks(each) if marked else each for each in ([prompt] if isinstance(prompt, str) else prompt)]
        with tokenizer_apart(tokenizer) as own:
            texts = [convert_text(pipe, own, each) for each in texts]
        return _Called(tuple(read_words(tokenizer, each) for each in texts), "", guided)
    except Exception as error:  # a tokenizer of whatever kind; maps of positions need none
        return _Called(reason=f"{type(tokenizer).__name__} does not tell where words are ({error})", guided=guided)


@contextlib.contextmanager
def collect_maps(
    pipe: Pipeline, *, layers: str | Sequence[str] | None = None, tokens: Sequence[int | str] | None = None
) -> Iterator[AttentionMaps]:
    """Collect head-averaged cross-attention maps while a pipeline runs, without ever storing per-head maps.

    A pipeline that is not patched is patched with the preset "exact" inside the block.

    Args:
        pipe: a pipeline that :func:`difffast.patch` supports.
        layers: names of the UNet's cross-attention layers, or shell-style patterns such as ``"up_blocks.1.*"``; None
            means all.  DeepFloyd IF's layers attend to text and pixels at once: the maps of its words add up to less
            than 1.
        tokens: words as the prompt writes them, or positions in the tokenised prompt, 0 being the start token; None
            means all.

    Yields:
        The :class:`AttentionMaps`.  Each new image empties them first.

    Raises:
        ValueError: no such layer, bad tokens, or a pipeline that cannot be patched; while the pipeline runs, a word
            that no prompt has, or words although the prompt is not given as text.
        RuntimeError: (while the pipeline runs) a chosen layer cannot be fused, with the reason.
    """
    if tokens is not None:
        tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
        if not tokens or not all(map(_is_token, tokens)):
            raise ValueError(f"tokens must be at least one word, or int of at least 0 (or None), got {tokens}")
    target = Target.of(pipe)
    if target.denoiser.text != "given":
        raise ValueError(
            f"no attention maps can be collected from a {type(target.unet).__name__}: its layers get the text "
            f"{target.denoiser.text}, which leaves no map a picture"
        )
    maps = AttentionMaps(choose_layers(target.unet, layers), tokens)
    collection = MapCollection(maps, target)
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


def _is_token(token: Any) -> bool:
    return (type(token) is int and token >= 0) or (isinstance(token, str) and bool(token.strip()))
