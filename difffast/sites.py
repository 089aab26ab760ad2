"""Which pipelines are patched, and with what: parts are put in under an undo stack, and taken out by running it."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .engines.user_compiled import unwrap
from .options import Options
from .sampling.parts import PARTS, take_out_unet
from .sampling.settings import Settings
from .surgery.subclass import is_swapped
from .surgery.undo import UndoStack
from .target import Target


class _Lock:
    """Held while anything is put in or taken out; whatever could not be taken out meanwhile is when it is released."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.RLock(), 0
        self._left: deque[UndoStack] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        if self._depth == 1:
            self._clear()
        self._depth -= 1
        self._lock.release()

    def _clear(self) -> None:
        while self._left:
            self._left.popleft().run()

    def take_out_dropped(self, undo: UndoStack) -> None:
        """Take out what a pipeline has left that is gone.

        The garbage collector may call this anywhere: in the middle of a patch, which must not change under itself, or
        in a thread that must not wait for another.
        """
        self._left.append(undo)
        if self._lock.acquire(blocking=False):
            try:
                if not self._depth:
                    self._clear()
            finally:
                self._lock.release()


#: Held while anything is put in or taken out.
lock = _Lock()


@dataclass
class Site:
    """One patched pipeline.

    Attributes:
        options: what was asked for.
        settings: what its runs read.
        unet: its plain UNet.
        undo: how everything is taken out.
        dropped: takes everything out when the pipeline is gone.
    """

    options: Options
    settings: Settings
    unet: nn.Module
    undo: UndoStack = field(default_factory=UndoStack)
    dropped: weakref.finalize[..., Any] | None = None


_sites: weakref.WeakKeyDictionary[Any, Site] = weakref.WeakKeyDictionary()


def find_site(pipe: Any) -> Site | None:
    """Return the site of a patched pipeline, or None."""
    with lock:
        return next((site for each, site in _sites.items() if each is pipe), None)


def refuse_neighbours(target: Target, settings: Settings) -> None:
    """Refuse what other patched pipelines rule out; nothing has been changed yet.

    Raises:
        ValueError: one of them shares the scheduler and wants other things.
    """
    for pipe, site in _sites.items():
        if pipe is not target.pipe:
            settings.refuse_neighbour(target.unet, site.settings, site.unet)


def put_in(pipe: Any, site: Site) -> None:
    """Put every part into a pipeline that is not patched; after an exception, :func:`take_out` cleans up."""
    _sites[pipe] = site
    site.dropped = weakref.finalize(pipe, lock.take_out_dropped, site.undo)
    site.dropped.atexit = False
    for part in PARTS:
        part(pipe, site.unet, site.settings, site.undo)


def take_out(pipe: Any) -> bool:
    """Take every part out of a pipeline; returns whether it was patched."""
    with lock:
        site = find_site(pipe)
        if site is None:
            unet = unwrap(getattr(pipe, "unet", None))
            if unet is not None and is_swapped(unet):
                take_out_unet(unet)  # of pipelines that are gone; those that are alive keep it
            return False
        site.undo.run()
        if site.dropped is not None:
            site.dropped.detach()
        del _sites[pipe]
        return True


def put_back(pipe: Any, earlier: Site | None) -> None:
    """Let a pipeline be as at ``earlier``: not patched, or patched with the very settings that its report reads.

    Where it holds no UNet now that can be patched so, the earlier one, which it may be given back, is patched again.
    """
    with lock:
        now = find_site(pipe)
        take_out(pipe)
        if earlier is None:
            return
        unet, settings = earlier.unet, earlier.settings
        with contextlib.suppress(TypeError, ValueError):
            target = Target.of(pipe)
            if target.unet is not unet:  # replaced meanwhile: what was asked for is attached to the new one
                settings, unet = earlier.options.resolve(target), target.unet
        if now is not None and now is not earlier:
            own = [each for each in settings.extensions if not each.stays]
            settings.extensions = (*own, *(each for each in now.settings.extensions if each.stays))
        try:
            put_in(pipe, Site(earlier.options, settings, unet))
        except BaseException:
            take_out(pipe)
            raise


def put_all_back(pipes: Sequence[Any], earlier: Sequence[Site | None]) -> None:
    """Put back several pipelines: the last one first, and each of them, whatever becomes of another."""
    with contextlib.ExitStack() as stack:
        for pipe, site in zip(pipes, earlier, strict=False):
            stack.callback(put_back, pipe, site)


@contextlib.contextmanager
def give_back(pipes: Sequence[Any], earlier: Sequence[Site | None]) -> Iterator[None]:
    """Put pipelines back at the end of the block; what was raised in it stays what is raised."""
    try:
        yield
    except BaseException:
        try:
            put_all_back(pipes, earlier)
        except Exception as error:
            warnings.warn(f"difffast: the earlier patch could not be put back: {error}", stacklevel=5)
        raise
    put_all_back(pipes, earlier)
