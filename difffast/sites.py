"""Which pipelines are patched, and with what: parts are put in under an undo stack, and taken out by running it."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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


def put_in(target: Target, options: Options, settings: Settings) -> None:
    """Put every part into a pipeline that is not patched; after an exception, :func:`take_out` cleans up.

    Raises:
        ValueError: another patched pipeline shares its scheduler and wants other things.
    """
    pipe, unet = target.pipe, target.unet
    for site in _sites.values():
        settings.refuse_neighbour(unet, site.settings, site.unet)
    site = _sites[pipe] = Site(options, settings, unet)
    for part in PARTS:
        part(pipe, unet, settings, site.undo)


def take_out(pipe: Any) -> bool:
    """Take every part out of a pipeline; returns whether it was patched."""
    with lock:
        site = find_site(pipe)
        if site is None:
            unet = getattr(pipe, "unet", None)
            if unet is not None and is_swapped(unet):
                take_out_unet(unet)  # of pipelines that are gone; those that are alive keep it
            return False
        site.undo.run()
        del _sites[pipe]
        return True
