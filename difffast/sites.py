"""Which pipelines are patched, and with what: parts are put in under an undo stack, and taken out by running it."""

from __future__ import annotations

import threading
import weakref
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

#: Held while anything is put in or taken out.
lock = threading.RLock()


@dataclass
class Site:
    """One patched pipeline.

    Attributes:
        options: what was asked for.
        settings: what its runs read.
        unet: its plain UNet.
        undo: how everything is taken out.
    """

    options: Options
    settings: Settings
    unet: nn.Module
    undo: UndoStack = field(default_factory=UndoStack)


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


def put_in(target: Target, site: Site) -> None:
    """Put every part into a pipeline that is not patched; after an exception, :func:`take_out` cleans up."""
    _sites[target.pipe] = site
    for part in PARTS:
        part(target.pipe, target.unet, site.settings, site.undo)


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
        del _sites[pipe]
        return True


def put_back(pipe: Any, earlier: Site | None) -> None:
    """Let a pipeline be as at ``earlier``: not patched, or patched with the very settings that its report reads."""
    with lock:
        now = find_site(pipe)
        take_out(pipe)
        if earlier is None:
            return
        target, settings = Target.of(pipe), earlier.settings
        if target.unet is not earlier.unet:  # replaced meanwhile: what was asked for is attached to the new one
            settings = earlier.options.resolve(target)
        if now is not None and now is not earlier:
            own = [each for each in settings.extensions if not each.stays]
            settings.extensions = (*own, *(each for each in now.settings.extensions if each.stays))
        put_in(target, Site(earlier.options, settings, target.unet))
