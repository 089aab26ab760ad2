import colorsys
import itertools

import numpy as np
import pytest
from drawn import shapes
from drawn.shapes import Scene, Thing, draw_scene, holds, render


def _scenes(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, **options) for _ in range(count)]


def _pixels(scene, side=64):
    return np.asarray(render(scene, side)).astype(int)


def _touched(thing, background):
    """Mask of the pixels that drawing the thing changes."""
    changed = _pixels(Scene((thing,), background, "")) != _pixels(Scene((), background, ""))
    return changed.any(2)


def test_the_same_seed_gives_the_same_scenes_and_pictures():
    first, second = _scenes(20, seed=3), _scenes(20, seed=3)
    assert first == second
    assert all((_pixels(a) == _pixels(b)).all() for a, b in zip(first, second, strict=True))
    assert _scenes(20, seed=4) != first


def test_there_is_enough_to_tell_apart():
    assert len(set(shapes.SHAPES)) >= 6
    assert len(set(shapes.COLOURS.values())) >= 8
    assert len(set(shapes.TEXTURES)) >= 3
    hues = sorted(colorsys.rgb_to_hsv(*colour)[0] * 360 for colour in shapes.COLOURS.values())
    gaps = [b - a for a, b in itertools.pairwise([*hues, hues[0] + 360])]
    assert min(gaps) > 15, "colours are told apart by hue"


def test_values_are_in_range_and_each_is_drawn():
    scenes = _scenes(400)
    things = [thing for scene in scenes for thing in scene.things]
    for thing in things:
        low, high = shapes.SIZES[thing.size]
        assert low <= thing.radius <= high
        assert 0 < thing.x < 1
        assert 0 < thing.y < 1
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert {thing.shape for thing in things} == set(shapes.SHAPES)
    assert {thing.colour for thing in things} == set(shapes.COLOURS)
    assert {thing.texture for thing in things} == set(shapes.TEXTURES)
    assert {thing.part for thing in things} == {*shapes.PARTS, None}
    assert {thing.size for thing in things} == set(shapes.SIZES)
    assert {scene.background for scene in scenes} == set(shapes.BACKGROUNDS)
    assert {scene.relation for scene in scenes} == {*shapes.RELATIONS, None}


@pytest.mark.parametrize("side", [64, 128])
def test_a_picture_is_rgb_of_the_side(side):
    image = render(_scenes(1)[0], side)
    assert (image.mode, image.size) == ("RGB", (side, side))


def test_sizes_agree_after_reduction():
    for scene in _scenes(40):
        difference = np.abs(np.asarray(render(scene, 128).reduce(2)).astype(int) - _pixels(scene))
        assert difference.mean() < 1.5  # of 255; edges and textures are sampled at other places
        assert difference.max() < 80


def test_every_look_changes_the_picture():
    plain = Thing("circle", "red")
    looks = [plain, *(Thing("circle", "red", texture=texture) for texture in ("striped", "dotted"))]
    looks += [Thing("circle", "red", part=part) for part in shapes.PARTS]
    looks += [Thing(shape, "red") for shape in shapes.SHAPES[1:]]
    pictures = [_pixels(Scene((thing,), "white", "")) for thing in looks]
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))


def test_things_neither_touch_nor_leave_the_picture():
    for scene in _scenes(60, seed=1):
        masks = [_touched(thing, scene.background) for thing in scene.things]
        for thing, mask in zip(scene.things, masks, strict=True):
            y, x = np.nonzero(mask)
            left, top, right, bottom = (64 * edge for edge in thing.box())
            assert left - 1 < x.min() <= x.max() < right + 1, "box() is of everything drawn"
            assert top - 1 < y.min() <= y.max() < bottom + 1
            assert not mask[[0, -1]].any(), "leaves the picture"
            assert not mask[:, [0, -1]].any(), "leaves the picture"
        # One pixel between the edges at least, each of which may be half covered.
        assert (sum(masks) <= 1).all(), "things touch"


def test_things_of_a_scene_have_different_shapes():
    assert all(len({thing.shape for thing in scene.things}) == 3 for scene in _scenes(50, things=3))


def test_relations_hold_and_are_said():
    for scene in _scenes(80, things=2, relation=True):
        a, b = scene.things
        assert holds(scene.relation, a, b)
        assert f" {scene.relation} {b.phrase(size=False).split()[0][0]}" in scene.caption
    unrelated = _scenes(40, things=2, relation=False) + _scenes(20, things=1) + _scenes(20, things=3)
    for scene in unrelated:
        assert scene.relation is None
        assert not any(relation in scene.caption for relation in shapes.RELATIONS)


def test_holds_by_hand():
    centre = Thing("circle", "red")
    beside, over = Thing("square", "red", x=0.8, y=0.6), Thing("square", "red", x=0.6, y=0.2)
    assert [how for how in shapes.RELATIONS if holds(how, centre, beside)] == ["to the left of"]
    assert [how for how in shapes.RELATIONS if holds(how, beside, centre)] == ["to the right of"]
    assert [how for how in shapes.RELATIONS if holds(how, over, centre)] == ["above"]
    assert [how for how in shapes.RELATIONS if holds(how, centre, over)] == ["below"]


def test_the_caption_names_every_thing_in_order():
    for scene in _scenes(150, seed=2):
        end = 0
        for thing in scene.things:
            # With the size or without, from the texture on: "striped red circle wearing a hat".
            text = thing.phrase(size=False).split(" ", 1)[1]
            start = scene.caption.find(text, end)
            assert start >= end, f"{text!r} is not in {scene.caption!r}"
            end = start + len(text)
        rest = scene.caption[end:]
        assert rest in ("", f" on a {scene.background} background")


def test_phrases():
    assert Thing("circle", "red", "striped", "small", "hat").phrase() == "a small striped red circle wearing a hat"
    assert Thing("star", "orange", part="boots").phrase() == "an orange star wearing boots"
    assert Thing("star", "pink", size="large").phrase(size=False) == "a pink star"


@pytest.mark.parametrize("things", [0, 4, -1])
def test_a_wrong_number_of_things(things):
    with pytest.raises(ValueError, match=f"things must be 1, 2 or 3, got {things}"):
        draw_scene(np.random.default_rng(0), things=things)


@pytest.mark.parametrize("things", [1, 3])
def test_a_relation_takes_two(things):
    with pytest.raises(ValueError, match=f"only two things can be in a relation, got things={things}"):
        draw_scene(np.random.default_rng(0), things=things, relation=True)


def test_an_unknown_relation():
    with pytest.raises(ValueError, match=r"relation must be one of .*, got 'behind'"):
        holds("behind", Thing("circle", "red"), Thing("star", "red"))
