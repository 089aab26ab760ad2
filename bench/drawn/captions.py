"""What else can be said of a scene, and scenes that differ from it in one thing that is said.

They are what a contrastive text encoder learns from: texts that mean the same, and texts that almost do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .shapes import Scene, Thing, article, caption, fits, place
from .vocabulary import CONVERSE, SHIPPED, WORN, Vocabulary

#: Ways to say what is in a scene, and how often each is taken.
FORMS = {"caption": 0.3, "reordered": 0.2, "clauses": 0.15, "list": 0.15, "partial": 0.15, "word": 0.05}
#: What of a scene can be altered.
ALTERATIONS = ("shape", "colour", "swap", "texture", "part", "relation", "background")
_GRAMMAR = ("a", "an", "and", "background", "is", "on", "that", "wears", ",")


def words(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Every word of captions and of paraphrases, and the comma, sorted."""
    kinds = (vocabulary.shapes, vocabulary.colours, vocabulary.textures[1:], vocabulary.sizes, vocabulary.backgrounds)
    phrases = [*vocabulary.relations, *(WORN[part] for part in vocabulary.parts), *_GRAMMAR]
    said = {word for kind in kinds for word in kind} | {word for phrase in phrases for word in phrase.split()}
    return tuple(sorted(said - {"medium"}))


def paraphrase(rng: np.random.Generator, scene: Scene, *, form: str | None = None) -> str:
    """A text that is true of the scene's picture, be it all that can be said or part of it.

    Args:
        rng: source of randomness.
        scene: what to speak of; its own caption need not be said again.
        form: one of ``FORMS``: "caption", as :func:`~.shapes.draw_scene` says it; "reordered", the same in another
            order; "clauses", "a circle that is red and striped"; "list", "red circle, blue square"; "partial", with
            words left out; "word", a shape, a colour or a part alone.  None: at random.

    Raises:
        ValueError: unknown form.
    """
    form = str(rng.choice(list(FORMS), p=list(FORMS.values()))) if form is None else form
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "word":
        return _word(rng, scene)
    things, relation = list(scene.things), scene.relation
    background = scene.background if rng.random() < 0.5 else None
    sizes = [bool(rng.random() < 0.5) for _ in things]
    if form in ("clauses", "list"):
        return _clauses(things, relation, background) if form == "clauses" else _list(things, background, sizes)
    if form == "reordered":
        order = np.roll(range(len(things)), 1) if len(things) < 3 else rng.permutation(len(things))
        things, relation = [things[i] for i in order], CONVERSE[relation] if relation else None
    if form == "partial":
        return _partial(rng, things, relation, background, sizes)
    return caption(things, relation, background, sizes=sizes)


def _word(rng: np.random.Generator, scene: Scene) -> str:
    thing = scene.things[rng.integers(len(scene.things))]
    return str(rng.choice([thing.shape, thing.shape, thing.colour, *([thing.part] if thing.part else ())]))


def _clauses(things: Sequence[Thing], relation: str | None, background: str | None) -> str:
    said = []
    for thing in things:
        noun = f"{thing.size} {thing.shape}" if thing.size != "medium" else thing.shape
        looks = [thing.colour, *([thing.texture] if thing.texture != "plain" else ())]
        worn = [f"wears {WORN[thing.part].removeprefix('wearing ')}"] if thing.part else []
        said.append(f"{article(noun)} {noun} that is {' and '.join(looks + worn)}")
    text = f", {relation} ".join(said) if relation else ", and ".join(said)
    return f"{text}, on {article(background)} {background} background" if background else text


def _list(things: Sequence[Thing], background: str | None, sizes: Sequence[bool]) -> str:
    said = [thing.phrase(size=size).split(" ", 1)[1] for thing, size in zip(things, sizes, strict=True)]
    return ", ".join([*said, f"{background} background"] if background else said)


def _partial(
    rng: np.random.Generator,
    things: Sequence[Thing],
    relation: str | None,
    background: str | None,
    sizes: Sequence[bool],
) -> str:
    """With textures and parts left out half of the time, and a thing too where there are several."""
    kept, told = [], []
    for thing, size in zip(things, sizes, strict=True):
        texture, part = (look if rng.random() < 0.5 else None for look in (thing.texture, thing.part))
        kept.append(replace(thing, texture=texture or "plain", part=part))
        told.append(size)
    if len(kept) > 1 and rng.random() < 0.4:
        left_out = int(rng.integers(len(kept)))
        del kept[left_out], told[left_out]
        relation = None
    return caption(kept, relation, background, sizes=told)


def alterations(scene: Scene, vocabulary: Vocabulary = SHIPPED) -> tuple[str, ...]:
    """Those of ``ALTERATIONS`` that change what the scene's caption says."""
    possible = {
        "swap": len({thing.colour for thing in scene.things}) > 1,
        "part": len(scene.things) <= vocabulary.most_dressed,
        "relation": scene.relation is not None,
        "background": scene.says_background,
    }
    return tuple(what for what in ALTERATIONS if possible.get(what, True))


def altered(
    rng: np.random.Generator, scene: Scene, *, vocabulary: Vocabulary = SHIPPED, what: str | None = None
) -> Scene:
    """A scene that differs in one attribute, as does its caption; all else stays, but for places without room.

    A thing that becomes plain or takes its hat off is said to be so by leaving the word out.

    Args:
        rng: source of randomness.
        scene: with a caption in the words of :func:`~.shapes.caption`.
        vocabulary: where other values are taken from.
        what: one of :func:`alterations`; "swap" gives two things each other's colours.  None: at random.

    Raises:
        ValueError: the scene has no such alteration.
    """
    possible = alterations(scene, vocabulary)
    if what is not None and what not in possible:
        raise ValueError(f"what must be one of {', '.join(possible)} for this scene, got {what!r}")
    sizes = [thing.phrase() in scene.caption for thing in scene.things]
    while True:
        things, relation, background = _changed(rng, scene, vocabulary, what or str(rng.choice(possible)))
        placed = tuple(things) if fits(things, relation) else place(rng, things, relation)
        if placed is not None:
            break
    said = background if scene.says_background else None
    return Scene(placed, background, caption(placed, relation, said, sizes=sizes), relation)


def _changed(
    rng: np.random.Generator, scene: Scene, vocabulary: Vocabulary, what: str
) -> tuple[list[Thing], str | None, str]:
    """Things, relation and background, one of them changed; the things where they were."""

    def other(values: Sequence[str | None], *taken: str | None) -> str | None:
        left = [value for value in values if value not in taken]
        return left[rng.integers(len(left))]

    things, relation, background = list(scene.things), scene.relation, scene.background
    i = int(rng.integers(len(things)))
    thing = things[i]
    looks: dict[str, Callable[[], str | None]] = {
        "shape": lambda: other(vocabulary.shapes, *(each.shape for each in things)),
        "colour": lambda: other(vocabulary.colours, thing.colour),
        "texture": lambda: other(vocabulary.textures, thing.texture),
        "part": lambda: other((*vocabulary.parts, None), thing.part),
    }
    if what in looks:
        things[i] = replace(thing, **{what: looks[what]()})
    elif what == "swap":
        pairs = [(a, b) for b in range(len(things)) for a in range(b) if things[a].colour != things[b].colour]
        a, b = pairs[rng.integers(len(pairs))]
        things[a], things[b] = (replace(things[j], colour=things[k].colour) for j, k in ((a, b), (b, a)))
    elif what == "relation":
        relation = other(vocabulary.relations, relation)
    else:
        background = other(vocabulary.backgrounds, background)
    return things, relation, background
