import colorsys
import hashlib
import itertools
import json

import numpy as np
import pytest
from drawn.rendering import render
from drawn.shapes import Scene, Thing, caption, draw_scene, holds
from drawn.vocabulary import LARGE, RADII, RGB, SHIPPED, SMALL
from training.recipe import RECIPES

from difffast.models import embedded_pipeline
from difffast.models.embedded import FOLDER

VOCABULARIES = pytest.mark.parametrize("vocabulary", [SMALL, LARGE], ids=["small", "large"])


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


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (SMALL, ("6bfdd87ba8e853930000a8b28e7fa9b6", "a85964649e15127e6588febc9f539050")),
        (LARGE, ("5f948829aee7f5467ec7f43d236f0b93", "40f2e54d5c066ccaed7ca56b82f9cc3e")),
    ],
    ids=["small", "large"],
)
def test_scenes_are_those_that_models_were_trained_on(vocabulary, expected):
    """Hashes of what the code drew when its results were committed."""
    scenes, pictures = hashlib.sha256(), hashlib.sha256()
    for i in range(500):
        rng = np.random.default_rng([22, i])
        scene = draw_scene(rng, vocabulary=vocabulary)
        things = [(t.shape, t.colour, t.texture, t.size, t.part, t.x, t.y, t.radius) for t in scene.things]
        scenes.update(repr((scene.caption, scene.background, scene.relation, things, rng.random())).encode())
        pictures.update(np.asarray(render(scene)).tobytes())
    for i in range(30):
        for count in (1, 2, 3):
            rng = np.random.default_rng([23, i])
            scene = draw_scene(rng, vocabulary=vocabulary, things=count, relation=count == 2)
            scenes.update((scene.caption + repr([(t.x, t.y, t.radius) for t in scene.things])).encode())
    assert (scenes.hexdigest()[:32], pictures.hexdigest()[:32]) == expected


def test_the_shipped_model_was_trained_on_the_larger_ones():
    record = json.loads((FOLDER / "training.json").read_text())
    assert SHIPPED is LARGE
    assert all(word in embedded_pipeline().tokenizer.get_vocab() for word in ("hourglass</w>", "magenta</w>"))
    assert record["recipe"]["scenes"] == RECIPES["cpu"].scenes


@pytest.mark.parametrize(("vocabulary", "enough"), [(SMALL, (6, 8, 3)), (LARGE, (10, 10, 4))])
def test_there_is_enough_to_tell_apart(vocabulary, enough):
    assert len(set(vocabulary.shapes)) >= enough[0]
    assert len({RGB[colour] for colour in vocabulary.colours}) >= enough[1]
    assert len(set(vocabulary.textures)) >= enough[2]
    hues = sorted(colorsys.rgb_to_hsv(*RGB[colour])[0] * 360 for colour in vocabulary.colours)
    gaps = [b - a for a, b in itertools.pairwise([*hues, hues[0] + 360])]
    assert min(gaps) > 20, "colours are told apart by hue"


def test_a_word_has_one_meaning():
    """Only a texture is said of things and of backgrounds."""
    kinds = (LARGE.shapes, LARGE.colours, LARGE.textures[1:], LARGE.sizes, LARGE.parts, LARGE.relations)
    words = [word for kind in kinds for word in kind]
    assert len(words) == len(set(words))
    assert set(words) & set(LARGE.backgrounds) == set(LARGE.textures[1:])


@VOCABULARIES
def test_values_are_in_range_and_each_is_drawn(vocabulary):
    scenes = _scenes(500, vocabulary=vocabulary)
    things = [thing for scene in scenes for thing in scene.things]
    for thing in things:
        low, high = RADII[thing.size]
        assert low <= thing.radius <= high
        assert 0 < thing.x < 1
        assert 0 < thing.y < 1
    assert {len(scene.things) for scene in scenes} == set(range(1, vocabulary.most + 1))
    assert {thing.shape for thing in things} == set(vocabulary.shapes)
    assert {thing.colour for thing in things} == set(vocabulary.colours)
    assert {thing.texture for thing in things} == set(vocabulary.textures)
    assert {thing.part for thing in things} == {*vocabulary.parts, None}
    assert {thing.size for thing in things} == set(vocabulary.sizes)
    assert {scene.background for scene in scenes} == set(vocabulary.backgrounds)
    assert {scene.relation for scene in scenes} == {*vocabulary.relations, None}


@pytest.mark.parametrize("side", [64, 128])
def test_a_picture_is_rgb_of_the_side(side):
    image = render(_scenes(1)[0], side)
    assert (image.mode, image.size) == ("RGB", (side, side))


@VOCABULARIES
def test_sizes_agree_after_reduction(vocabulary):
    for scene in _scenes(40, vocabulary=vocabulary):
        difference = np.abs(np.asarray(render(scene, 128).reduce(2)).astype(int) - _pixels(scene))
        assert difference.mean() < 1.5  # of 255; edges and textures are sampled at other places
        assert difference.max() < 80


def test_every_look_changes_the_picture():
    plain = Thing("circle", "red")
    looks = [plain, *(Thing("circle", "red", texture=texture) for texture in LARGE.textures[1:])]
    looks += [Thing("circle", "red", part=part) for part in LARGE.parts]
    looks += [Thing(shape, "red") for shape in LARGE.shapes[1:]]
    pictures = [_pixels(Scene((thing,), "white", "")) for thing in looks]
    pictures += [_pixels(Scene((plain,), background, "")) for background in LARGE.backgrounds[1:]]
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))


def test_backgrounds_are_grey():
    for background in LARGE.backgrounds:
        assert np.ptp(_pixels(Scene((), background, "")), axis=2).max() == 0


@VOCABULARIES
def test_things_neither_touch_nor_leave_the_picture(vocabulary):
    for scene in _scenes(60, seed=1, vocabulary=vocabulary):
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


def test_glasses_are_on_the_thing():
    for shape in LARGE.shapes:
        bare, worn = Thing(shape, "red"), Thing(shape, "red", part="glasses")
        changed = (_pixels(Scene((bare,), "white", "")) != _pixels(Scene((worn,), "white", ""))).any(2)
        on = _touched(bare, "white")
        assert (changed & on).sum() > 20, shape


@VOCABULARIES
def test_things_of_a_scene_have_different_shapes(vocabulary):
    for scene in _scenes(50, things=vocabulary.most, vocabulary=vocabulary):
        assert len({thing.shape for thing in scene.things}) == vocabulary.most


def test_relations_hold_and_are_said():
    for scene in _scenes(80, things=2, relation=True):
        a, b = scene.things
        assert holds(scene.relation, a, b)
        assert f" {scene.relation} {b.phrase(size=False).split()[0][0]}" in scene.caption
    unrelated = _scenes(40, things=2, relation=False) + _scenes(20, things=1) + _scenes(20, things=3)
    for scene in unrelated:
        assert scene.relation is None
        assert not any(relation in scene.caption for relation in SHIPPED.relations)


def test_holds_by_hand():
    centre = Thing("circle", "red")
    beside, over = Thing("square", "red", x=0.8, y=0.6), Thing("square", "red", x=0.6, y=0.2)
    assert [how for how in SHIPPED.relations if holds(how, centre, beside)] == ["to the left of"]
    assert [how for how in SHIPPED.relations if holds(how, beside, centre)] == ["to the right of"]
    assert [how for how in SHIPPED.relations if holds(how, over, centre)] == ["above"]
    assert [how for how in SHIPPED.relations if holds(how, centre, over)] == ["below"]


@VOCABULARIES
def test_the_caption_names_every_thing_in_order(vocabulary):
    for scene in _scenes(150, seed=2, vocabulary=vocabulary):
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
    assert Thing("heart", "lime", "checkered", part="glasses").phrase() == "a checkered lime heart wearing glasses"


def test_captions_by_hand():
    things = Thing("circle", "red"), Thing("star", "blue", size="small"), Thing("ring", "orange")
    assert caption(things[:1], None, None, sizes=[True]) == "a red circle"
    assert caption(things[:2], None, "grey", sizes=[True, False]) == "a red circle and a blue star on a grey background"
    assert caption(things[:2], "above", None, sizes=[True, True]) == "a red circle above a small blue star"
    assert caption(things, None, None, sizes=[True] * 3) == "a red circle, a small blue star and an orange ring"


@pytest.mark.parametrize("things", [0, 5, 6])
def test_a_wrong_number_of_things(things):
    with pytest.raises(ValueError, match=f"things must be 1, 2, 3 or 4, got {things}"):
        draw_scene(np.random.default_rng(0), things=things)
    with pytest.raises(ValueError, match=f"things must be 1, 2 or 3, got {4 + things}"):
        draw_scene(np.random.default_rng(0), things=4 + things, vocabulary=SMALL)


@pytest.mark.parametrize("things", [1, 3])
def test_a_relation_takes_two(things):
    with pytest.raises(ValueError, match=f"only two things can be in a relation, got things={things}"):
        draw_scene(np.random.default_rng(0), things=things, relation=True)


def test_an_unknown_relation():
    with pytest.raises(ValueError, match=r"relation must be one of .*, got 'behind'"):
        holds("behind", Thing("circle", "red"), Thing("star", "red"))
