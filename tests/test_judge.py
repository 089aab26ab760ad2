import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from drawn import judge as judging
from drawn.detector import background_of, detect
from drawn.judge import accuracy, degrade, judge, summary
from drawn.rendering import render
from drawn.shapes import Scene, Thing, draw_scene
from drawn.vocabulary import LARGE, RGB, SMALL
from PIL import Image, ImageDraw

VOCABULARIES = pytest.mark.parametrize("vocabulary", [SMALL, LARGE], ids=["small", "large"])
RED = Thing("circle", "red", x=0.25, y=0.5)
BLUE = Thing("square", "blue", x=0.75, y=0.5)
GREEN = Thing("star", "green", x=0.5, y=0.2, radius=0.13)


def _scene(*things, relation=None, background="white"):
    return Scene(things, background, "", relation)


def _judge(prompt, shown):
    return judge(render(shown), prompt)


def _looks(found):
    return [(f.shape, f.colour, f.texture, f.part) for f in found]


# The detector.


@pytest.mark.parametrize(
    ("vocabulary", "scenes", "expected"),
    [
        (SMALL, 60, "4703a4de2c715d64f7cbcdf44411cfd40e95030207c10ce7871978bdc046e247"),
        (LARGE, 60, "e76ba698794dad48d9fbb0064d13b340629618553aca1bc2a8242e75bfe1499e"),
        pytest.param(
            SMALL, 300, "cbe9115a24ec2e93c687021d53ded7f9362e04de0256f2ab26dace2d59f0745f", marks=pytest.mark.slow
        ),
    ],
    ids=["small", "large", "small, many"],
)
def test_verdicts_stay_the_same(scenes, expected, vocabulary):
    """The hash of what the code said when its results were committed."""
    said = hashlib.sha256()
    for i in range(scenes):
        rng = np.random.default_rng([24, i])
        scene = draw_scene(rng, vocabulary=vocabulary)
        image = render(scene)
        for picture in (image, degrade(image, rng), degrade(image, rng, noise=40.0)):
            verdict = judge(picture, scene, vocabulary=vocabulary)
            said.update(repr((verdict, _looks(detect(picture, vocabulary=vocabulary)))).encode())
    assert said.hexdigest() == expected


def _check(rates, *, found, texture, part, extra, background):
    assert rates["found"] >= found
    assert rates["texture"] >= texture
    assert rates["part"] >= part
    assert rates["extra"] <= extra
    assert rates["background"] >= background


def test_accuracy_on_drawn_scenes():
    rates = accuracy(300, seed=7)
    _check(rates, found=0.995, texture=0.995, part=0.995, extra=0.01, background=0.995)


@pytest.mark.parametrize(("vocabulary", "most"), [(SMALL, 0.052), (LARGE, 0.1)], ids=["small", "large"])
def test_heavy_noise_hides_few_things(vocabulary, most):
    rng = np.random.default_rng(5)
    missed = things = 0
    for _ in range(40):
        scene = draw_scene(rng, vocabulary=vocabulary)
        picture = degrade(render(scene), rng, noise=32)
        seen = {(f.shape, f.colour) for f in detect(picture, vocabulary=vocabulary)}
        missed += sum((thing.shape, thing.colour) not in seen for thing in scene.things)
        things += len(scene.things)
    assert missed <= most * things


@pytest.mark.parametrize("part", [None, "hat"])
@pytest.mark.parametrize("shape", LARGE.shapes)
def test_a_squeezed_thing_keeps_its_shape(shape, part):
    picture = render(_scene(Thing(shape, "green", part=part)), 256).resize((64, 52), Image.Resampling.BOX)
    squeezed = Image.new("RGB", (64, 64), (250, 250, 250))
    squeezed.paste(picture, (0, 4))
    (found,) = detect(squeezed, vocabulary=LARGE)
    assert (found.shape, found.part) == (shape, part)


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "scenes"), [(SMALL, 500), (LARGE, 2000)], ids=["small", "large"])
@pytest.mark.parametrize("degraded", [False, True])
def test_accuracy_on_many_scenes(degraded, vocabulary, scenes):
    rates = accuracy(scenes, seed=9, degraded=degraded, vocabulary=vocabulary)
    assert rates["things"] > 1.5 * scenes
    _check(rates, found=0.995, texture=0.99, part=0.99, extra=0.005, background=0.99)


def test_accuracy_counts_what_is_missed(monkeypatch):
    monkeypatch.setattr(judging, "detect", lambda image, vocabulary: ())
    monkeypatch.setattr(judging, "background_of", lambda image, vocabulary: None)
    rates = accuracy(5)
    assert rates == {"things": rates["things"], "found": 0, "texture": 0, "part": 0, "extra": 0, "background": 0}
    with pytest.raises(ValueError, match="scenes must be at least 1, got 0"):
        accuracy(0)


@pytest.mark.parametrize("background", ["white", "grey", "gradient"])
@pytest.mark.parametrize("shape", SMALL.shapes)
def test_a_thing_is_found_with_all_it_has(shape, background):
    for i, colour in enumerate(SMALL.colours):
        thing = Thing(
            shape, colour, SMALL.textures[i % 3], part=(None, *SMALL.parts)[i // 3], x=0.45, y=0.55, radius=0.17
        )
        (found,) = detect(render(_scene(thing, background=background)))
        assert (found.shape, found.colour, found.texture, found.part) == (shape, colour, thing.texture, thing.part)
        assert math.hypot(found.x - thing.x, found.y - thing.y) < 0.012
        assert found.radius == pytest.approx(thing.radius, rel=0.06)
        assert 0.85 < found.score <= 1


@pytest.mark.parametrize("background", LARGE.backgrounds)
@pytest.mark.parametrize("shape", LARGE.shapes)
def test_every_look_is_found_on_every_background(shape, background):
    for i, colour in enumerate(LARGE.colours):
        texture, part = LARGE.textures[i % 4], (None, *LARGE.parts)[(i + i // 4) % 4]
        thing = Thing(shape, colour, texture, part=part, x=0.45, y=0.55, radius=0.17)
        picture = render(_scene(thing, background=background))
        (found,) = detect(picture, vocabulary=LARGE)
        assert _looks([found]) == [(shape, colour, texture, part)]
        assert math.hypot(found.x - thing.x, found.y - thing.y) < 0.012
        assert found.radius == pytest.approx(thing.radius, rel=0.06)
        assert background_of(picture, vocabulary=LARGE) == background


def test_what_glasses_part_is_one_thing():
    """They may leave a tip and a rest, each of which looks like a thing of its own."""
    for shape in LARGE.shapes:
        for radius in (0.13, 0.17, 0.24):
            (found,) = detect(render(_scene(Thing(shape, "blue", part="glasses", radius=radius))), vocabulary=LARGE)
            assert (found.shape, found.part) == (shape, "glasses")


def test_a_hat_between_two_things_does_not_join_them():
    below, above = Thing("circle", "red", part="hat", x=0.5, y=0.72), Thing("square", "red", x=0.5, y=0.24)
    found = detect(render(_scene(below, above)), vocabulary=LARGE)
    assert sorted(_looks(found)) == [("circle", "red", "plain", "hat"), ("square", "red", "plain", None)]


def test_the_background_of_a_picture_that_shows_none():
    hidden = np.full((64, 64, 3), RGB["red"], np.uint8)
    assert background_of(hidden, vocabulary=LARGE) is None
    assert background_of(np.full((64, 64, 3), 168, np.uint8), vocabulary=LARGE) == "grey"


def test_any_size_and_either_type_of_picture():
    scene = draw_scene(np.random.default_rng(5), things=3)
    small, large = detect(render(scene)), detect(render(scene, 128))
    assert _looks(small) == _looks(large)
    assert [f.x for f in small] == pytest.approx([f.x for f in large], abs=0.01)
    assert detect(np.asarray(render(scene))) == small
    assert detect(render(scene).convert("RGBA")) == small


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), r"image must be uint8 \[H, W, 3\], got float32 \[64, 64, 3\]"),
        (np.zeros((64, 64), np.uint8), r"image must be uint8 \[H, W, 3\], got uint8 \[64, 64\]"),
        (np.zeros((64, 32, 3), np.uint8), "image must be square, got 32x64"),
        (Image.new("RGB", (64, 32)), "image must be square, got 64x32"),
    ],
)
def test_wrong_pictures(image, message):
    with pytest.raises(ValueError, match=message):
        detect(image)


@VOCABULARIES
@pytest.mark.parametrize("grey", [0, 128, 168, 255])
def test_nothing_is_found_in_a_blank_picture(grey, vocabulary):
    assert detect(np.full((64, 64, 3), grey, np.uint8), vocabulary=vocabulary) == ()


@VOCABULARIES
def test_no_shape_is_found_in_noise(vocabulary):
    rng = np.random.default_rng(0)
    assert detect(rng.integers(0, 256, (64, 64, 3), np.uint8), vocabulary=vocabulary) == ()
    for _ in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        assert not any(f.shape for f in detect(coarse, vocabulary=vocabulary))


def _drawn(*polygons):
    image = Image.new("RGB", (256, 256), (250, 250, 250))
    for colour, corners in polygons:
        ImageDraw.Draw(image).polygon(corners, fill=RGB[colour])
    return image.reduce(4)


def _box(left, top, right, bottom):
    return [(left, top), (right - 1, top), (right - 1, bottom - 1), (left, bottom - 1)]


def test_a_blob_has_a_colour_but_no_shape():
    blob = [(60, 90), (120, 60), (200, 80), (180, 120), (210, 170), (130, 150), (90, 200), (80, 140)]
    for picture in (
        _drawn(("green", blob)),
        _drawn(("green", _box(60, 100, 200, 150))),
        _drawn(("green", _box(0, 0, 256, 256))),
    ):
        for vocabulary in (SMALL, LARGE):
            (found,) = detect(picture, vocabulary=vocabulary)
            assert (found.shape, found.colour) == (None, "green")


def test_a_thing_in_two_colours_is_one_thing():
    (found,) = detect(_drawn(("red", _box(80, 80, 144, 176)), ("blue", _box(144, 80, 176, 176))))
    assert (found.shape, found.colour) == ("square", "red")


def test_a_seam_of_a_third_colour_is_no_thing():
    seamed = _drawn(
        ("red", _box(80, 80, 120, 176)), ("purple", _box(120, 80, 136, 176)), ("blue", _box(136, 80, 176, 176))
    )
    (found,) = detect(seamed)
    assert found.shape == "square"


def test_two_things_that_touch_are_two():
    found = detect(_drawn(("red", _box(30, 80, 120, 170)), ("blue", _box(120, 90, 190, 160))))
    assert _looks(found) == [("square", "red", "plain", None), ("square", "blue", "plain", None)]


def test_degrade_blurs_and_adds_noise():
    rng = np.random.default_rng(0)
    flat = Image.new("RGB", (64, 64), (128, 128, 128))
    assert np.asarray(degrade(flat, rng), float).std() == pytest.approx(8, rel=0.05)
    edge = np.asarray(degrade(render(_scene(RED)), rng, noise=0), float)
    assert 2 < np.abs(edge - np.asarray(render(_scene(RED)))).max() < 200


# Verdicts.


def test_a_scene_shown_as_said():
    scene = _scene(RED, replace(BLUE, texture="dotted", part="hat"), relation="to the left of")
    verdict = _judge(scene, scene)
    assert verdict == judging.Verdict(2, 2, 0, True, 1, 1, 1, 0, True)


def test_swapped_colours_are_leaks():
    verdict = _judge(_scene(RED, BLUE), _scene(replace(RED, colour="blue"), replace(BLUE, colour="red")))
    assert (verdict.presence, verdict.binding, verdict.full_binding, verdict.leakage) == (1, 0, 0, 1)
    assert verdict.count
    assert verdict.extra == 0


def test_a_colour_that_nobody_said_is_no_leak():
    verdict = _judge(_scene(RED, BLUE), _scene(replace(RED, colour="green"), BLUE))
    assert (verdict.presence, verdict.binding, verdict.leakage) == (1, 0.5, 0)


@pytest.mark.parametrize("look", [{"texture": "striped"}, {"part": "boots"}])
def test_a_texture_or_part_at_the_wrong_thing(look):
    verdict = _judge(_scene(replace(RED, **look), BLUE), _scene(RED, replace(BLUE, **look)))
    # The square leaks; the circle is only plain, or bare, which is said of nothing.
    assert (verdict.presence, verdict.binding, verdict.full_binding, verdict.leakage) == (1, 1, 0, 0.5)


@pytest.mark.parametrize(("caption", "leakage"), [("", 0), ("a red circle on a striped background", 1)])
def test_the_backgrounds_texture_at_a_thing_is_a_leak_if_it_was_said(caption, leakage):
    said = Scene((RED,), "striped", caption)
    shown = _scene(replace(RED, texture="striped"), background="striped")
    assert judge(render(shown), said, vocabulary=LARGE).leakage == leakage
    assert judge(render(replace(shown, things=(RED,))), said, vocabulary=LARGE).leakage == 0


def test_a_missing_thing():
    verdict = _judge(_scene(RED, BLUE, relation="to the left of"), _scene(RED))
    assert (verdict.presence, verdict.binding, verdict.leakage) == (0.5, 0.5, 0)
    assert (verdict.count, verdict.extra, verdict.relation) == (False, 0, False)


def test_an_extra_thing():
    verdict = _judge(_scene(RED, BLUE), _scene(RED, BLUE, GREEN))
    assert (verdict.presence, verdict.full_binding, verdict.extra, verdict.count) == (1, 1, 1, False)


def test_another_shape_is_not_the_thing():
    verdict = _judge(_scene(RED, BLUE), _scene(RED, replace(BLUE, shape="triangle")))
    assert (verdict.presence, verdict.extra, verdict.count) == (0.5, 1, True)


def test_of_two_of_one_shape_the_right_one_counts():
    twice = _scene(replace(RED, colour="green", radius=0.2), replace(RED, x=0.75))
    verdict = _judge(_scene(RED), twice)
    assert (verdict.binding, verdict.extra, verdict.count) == (1, 1, False)


def test_relations():
    shown = _scene(RED, BLUE)
    said = {
        how: _judge(_scene(RED, BLUE, relation=how), shown).relation
        for how in ("to the left of", "to the right of", "above")
    }
    assert said == {"to the left of": True, "to the right of": False, "above": False}
    assert _judge(_scene(RED, BLUE), shown).relation is None
    # Colours do not matter to it.
    other = _scene(replace(RED, colour="pink"), BLUE)
    assert _judge(_scene(RED, BLUE, relation="to the left of"), other).relation is True


def test_a_blank_picture_and_noise_show_nothing():
    scene = _scene(RED, BLUE, relation="above")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    for picture in (np.full((64, 64, 3), 250, np.uint8), noise):
        assert judge(picture, scene) == judging.Verdict(2, 0, 0, False, 0, 0, 0, None, False)


def test_scenes_that_cannot_be_judged():
    blank = np.full((64, 64, 3), 250, np.uint8)
    with pytest.raises(ValueError, match="things must be of different shapes"):
        judge(blank, _scene(RED, replace(RED, x=0.75)))
    with pytest.raises(ValueError, match="and one at least, got"):
        judge(blank, _scene())
    with pytest.raises(ValueError, match="only two things can be in a relation, got 1"):
        judge(blank, _scene(RED, relation="above"))


def test_summary_weighs_things_alike():
    whole = judging.Verdict(1, 1, 0, True, 1.0, 1.0, 1.0, 0.0, None)
    part = judging.Verdict(3, 2, 1, True, 2 / 3, 1 / 3, 0.0, 0.5, False)
    none = judging.Verdict(2, 0, 0, False, 0.0, 0.0, 0.0, None, True)
    assert summary([whole, part, none]) == pytest.approx(
        {
            "pictures": 3,
            "things": 6,
            "presence": 3 / 6,
            "binding": 2 / 6,
            "full_binding": 1 / 6,
            "leakage": 1 / 3,  # of the three things present
            "relations": 2,
            "relation": 1 / 2,
            "count": 2 / 3,
            "extra": 1 / 3,
        }
    )
    alone = summary([replace(none, relation=None)])
    assert alone["leakage"] is None
    assert alone["relation"] is None
    with pytest.raises(ValueError, match="at least one verdict"):
        summary([])
