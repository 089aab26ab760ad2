"""Pictures of scenes."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .outlines import CORNERS, part_boxes
from .shapes import SIDE, Scene, Thing
from .vocabulary import RGB

#: Waves of a texture in a picture's side.
THING_WAVES, BACKGROUND_WAVES = 10, 8
_SHADE = 0.55  # of a texture's dark places
_BLACK = (20, 20, 20)
_WHITE, _GREY = 250, 168
_PALE = 212  # of a textured background's dark places
_SUPERSAMPLING = 4


def render(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture of a scene, ``side`` x ``side`` pixels, RGB, antialiased."""
    n = side * _SUPERSAMPLING
    picture = _background(scene.background, n).copy()
    for thing in scene.things:
        _draw(picture, thing, n)
    return picture.reduce(_SUPERSAMPLING)


@lru_cache(maxsize=16)
def _background(name: str, n: int) -> Image.Image:
    if name in ("striped", "dotted", "checkered"):
        grey = np.where(_texture(name, n, BACKGROUND_WAVES) > 0, _PALE, _WHITE).astype(np.uint8)
    else:
        ends = {"white": (_WHITE, _WHITE), "grey": (_GREY, _GREY), "gradient": (_WHITE, _GREY)}[name]
        grey = np.broadcast_to(np.linspace(*ends, n).round().astype(np.uint8)[:, None], (n, n))
    return Image.fromarray(np.repeat(grey[..., None], 3, 2))


def _draw(picture: Image.Image, thing: Thing, n: int) -> None:
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    x, y, r = thing.x * n, thing.y * n, thing.radius * n
    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if thing.shape == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
    else:
        draw.polygon([(x + u * r, y + v * r) for u, v in CORNERS[thing.shape]], fill=255)
    colour = RGB[thing.colour]
    picture.paste(colour, mask=mask)
    if thing.texture != "plain":
        dark = Image.fromarray(np.minimum(np.asarray(mask), _texture(thing.texture, n, THING_WAVES)))
        picture.paste(tuple(round(_SHADE * c) for c in colour), mask=dark)
    if thing.part:
        pen = ImageDraw.Draw(picture)
        for left, top, right, bottom in part_boxes(thing.shape, thing.part):
            pen.rectangle((x + left * r, y + top * r, x + right * r, y + bottom * r), fill=_BLACK)


@lru_cache(maxsize=32)
def _texture(name: str, n: int, waves: int) -> np.ndarray:
    """Mask of a texture's dark places."""
    wave = np.cos(2 * math.pi * waves * (np.arange(n) + 0.5) / n)
    down, across = wave[:, None], wave[None]
    if name == "striped":
        dark = np.broadcast_to(down, (n, n)) > 0
    elif name == "dotted":
        dark = (down + across) / 2 > 0.3
    else:
        dark = down * across > 0
    return np.where(dark, 255, 0).astype(np.uint8)
