import re
from itertools import pairwise

import numpy as np
import pytest
from drawn.captions import ALTERATIONS, FORMS, alterations, altered, paraphrase, words
from drawn.rendering import render
from drawn.shapes import Scene, Thing, caption, draw_scene, fits, holds
from drawn.vocabulary import LARGE, SMALL

VOCABULARIES = pytest.mark.parametrize("vocabulary", [SMALL, LARGE], ids=["small", "large"])
#: Of CLIP's 77 tokens, two mark the start and the end.
MOST_WORDS = 75

RED, BLUE = Thing("circle", "red", x=0.25), Thing("square", "blue", x=0.75)
STAR = Thing("star", "green", "striped", "large", "hat", radius=0.24)


def _scenes(count, vocabulary, seed=0, **options):
    rng = np.random.default_rng(seed)
    return rng, [draw_scene(rng, vocabulary=vocabulary, **options) for _ in range(count)]


def _tokens(text):
    return re.findall(r"\w+|,", text)


def _claims(text):
    """What a text says: of each noun its looks; the relation; the background.

    Looks are the words just before a noun, and those after "that is" up to a comma or "wearing".
    """
    background = re.search(r"(\w+) background$", text)
    rest = text[: background.start()] if background else text
    looks = "|".join((*LARGE.colours, *LARGE.textures, *LARGE.sizes))
    things = []
    for found in re.finditer(rf"((?:(?:{looks}) )*)\b({'|'.join(LARGE.shapes)})\b( that is [^,]*)?", rest):
        worn = re.match(r" wearing (?:a )?(\w+)", rest[found.end() :])
        after = set(re.findall(rf"\b(?:{looks}|{'|'.join(LARGE.parts)})\b", found[3] or ""))
        things.append((found[2], {*found[1].split(), *after, *([worn[1]] if worn else [])}))
    relations = re.findall("|".join(LARGE.relations), rest)
    assert len(relations) <= 1
    return things, relations[0] if relations else None, background and background.group(1)


def _true(text, scene):
    things, relation, background = _claims(text)
    shown = {thing.shape: thing for thing in scene.things}
    for shape, looks in things:
        thing = shown[shape]
        assert looks <= {thing.colour, thing.texture, thing.size, thing.part}, f"{looks} of {shape} in {text!r}"
    if relation:
        assert holds(relation, *(shown[shape] for shape, _ in things)), text
    assert background in (None, scene.background)
    return things


# Paraphrases.


def test_the_reader_of_these_tests_by_hand():
    text = "a small star that is green and striped and wears a hat, above a circle that is red, on a grey background"
    assert _claims(text) == ([("star", {"small", "green", "striped", "hat"}), ("circle", {"red"})], "above", "grey")
    text = "a striped red star wearing boots, a blue circle and a ring wearing glasses"
    looks = [("star", {"striped", "red", "boots"}), ("circle", {"blue"}), ("ring", {"glasses"})]
    assert _claims(text) == (looks, None, None)
    assert _claims("red circle, dotted square, dotted background")[0] == [("circle", {"red"}), ("square", {"dotted"})]


@VOCABULARIES
@pytest.mark.parametrize("form", [form for form in FORMS if form != "word"])
def test_a_paraphrase_is_true_of_the_scene(vocabulary, form):
    rng, scenes = _scenes(150, vocabulary)
    for scene in scenes:
        said = dict(_true(paraphrase(rng, scene, form=form), scene))
        nouns = {thing.shape for thing in scene.things}
        if form == "partial":
            assert said
            continue
        assert set(said) == nouns, "every thing is said"
        for thing in scene.things:
            looks = {thing.colour, *{thing.texture} - {"plain"}, *([thing.part] if thing.part else [])}
            assert looks <= said[thing.shape]


def test_paraphrases_by_hand():
    rng = np.random.default_rng(0)
    scene = Scene((RED, BLUE), "grey", "", "to the left of")

    def texts(form, scene=scene):
        return {paraphrase(rng, scene, form=form) for _ in range(60)}

    on = " on a grey background"
    said = "a red circle to the left of a blue square"
    assert texts("caption") == {said, said + on}
    said = "a blue square to the right of a red circle"
    assert texts("reordered") == {said, said + on}
    said = "a circle that is red, to the left of a square that is blue"
    assert texts("clauses") == {said, f"{said},{on}"}
    assert texts("list") == {"red circle, blue square", "red circle, blue square, grey background"}
    assert texts("word") == {"circle", "square", "red", "blue"}
    assert {"a red circle", "a blue square", "a blue square" + on} < texts("partial")
    star = Scene((STAR,), "white", "")
    said = "a large star that is green and striped and wears a hat"
    assert texts("clauses", star) == {said, f"{said}, on a white background"}
    assert {"a green star", "a striped green star", "a large green star wearing a hat"} < texts("partial", star)
    assert texts("word", star) == {"star", "green", "hat"}


def test_a_reordered_caption_is_another_one():
    rng, scenes = _scenes(60, LARGE, things=2)
    for scene in scenes:
        first = [shape for shape, _ in _claims(paraphrase(rng, scene, form="reordered"))[0]]
        assert first == [thing.shape for thing in reversed(scene.things)]


def test_every_form_is_taken():
    rng, (scene, *_) = _scenes(1, LARGE, things=3)
    texts = [paraphrase(rng, scene) for _ in range(300)]
    shares = {
        "clauses": np.mean([" that is " in text for text in texts]),
        "list": np.mean([text.split()[0] not in ("a", "an") and " " in text for text in texts]),
        "word": np.mean([" " not in text for text in texts]),
    }
    assert shares == pytest.approx({form: FORMS[form] for form in shares}, abs=0.06)


def test_four_things_with_everything_said_fit_in_clips_tokens():
    """One token a word, and one a comma."""
    looks = zip(LARGE.shapes, ("orange", "red", "blue", "pink"), strict=False)
    things = tuple(Thing(shape, colour, "striped", "small", "hat") for shape, colour in looks)
    assert len(things) == LARGE.most
    scene, rng = Scene(things, "checkered", ""), np.random.default_rng(0)
    longest = {form: max(len(_tokens(paraphrase(rng, scene, form=form))) for _ in range(400)) for form in FORMS}
    longest_thing = "a small star that is red and striped and wears a hat"
    assert longest["clauses"] == 4 * len(_tokens(longest_thing)) + 3 * 2 + 5
    assert max(longest.values()) <= MOST_WORDS
    two = Scene(things[:2], "checkered", "", "to the right of")
    assert max(len(_tokens(paraphrase(rng, two))) for _ in range(400)) <= MOST_WORDS


@VOCABULARIES
def test_every_word_is_known(vocabulary):
    rng, scenes = _scenes(400, vocabulary)
    said = {word for scene in scenes for text in (scene.caption, paraphrase(rng, scene)) for word in _tokens(text)}
    for scene in scenes[:150]:
        said |= {word for form in FORMS for word in _tokens(paraphrase(rng, scene, form=form))}
    assert said == set(words(vocabulary))
    assert all(a < b for a, b in pairwise(words(vocabulary)))


def test_an_unknown_form():
    with pytest.raises(ValueError, match=r"form must be one of caption, .*, word, got 'poem'"):
        paraphrase(np.random.default_rng(0), Scene((RED,), "white", ""), form="poem")


# Scenes that differ in one attribute.


def _differences(a, b):
    """What of two scenes differs, but for places."""
    found = [
        name
        for one, two in zip(a.things, b.things, strict=True)
        for name in ("shape", "colour", "texture", "size", "part", "radius")
        if getattr(one, name) != getattr(two, name)
    ]
    return found + [name for name in ("background", "relation") if getattr(a, name) != getattr(b, name)]


@VOCABULARIES
@pytest.mark.parametrize("what", ALTERATIONS)
def test_one_attribute_differs(vocabulary, what):
    rng, scenes = _scenes(250, vocabulary, seed=1)
    scenes = [scene for scene in scenes if what in alterations(scene, vocabulary)]
    assert len(scenes) > 40
    for scene in scenes:
        other = altered(rng, scene, vocabulary=vocabulary, what=what)
        assert _differences(scene, other) == (["colour"] * 2 if what == "swap" else [what])
        assert fits(other.things, other.relation)
        assert len({thing.shape for thing in other.things}) == len(scene.things)
        if what == "swap":
            assert sorted(t.colour for t in scene.things) == sorted(t.colour for t in other.things)


@VOCABULARIES
def test_the_altered_caption_is_that_of_the_altered_scene(vocabulary):
    rng, scenes = _scenes(300, vocabulary, seed=2)
    for scene in scenes:
        other = altered(rng, scene, vocabulary=vocabulary)
        _true(other.caption, other)
        assert other.caption != scene.caption
        assert (" background" in other.caption) == (" background" in scene.caption)
        sizes = [[word for word in _tokens(each.caption) if word in LARGE.sizes] for each in (scene, other)]
        assert sizes[0] == sizes[1]


def test_places_stay_where_there_is_room():
    rng, scenes = _scenes(100, LARGE, seed=3)
    for scene in scenes:
        other = altered(rng, scene, vocabulary=LARGE, what="colour")
        assert [(t.x, t.y) for t in other.things] == [(t.x, t.y) for t in scene.things]
        changed = (np.asarray(render(scene)) != np.asarray(render(other))).any(2)
        assert 0 < changed.sum() < 64 * 64 / 3


def test_what_cannot_be_altered():
    plain = Scene((RED, BLUE), "grey", caption((RED, BLUE), None, None, sizes=[True, True]))
    assert alterations(plain) == ("shape", "colour", "swap", "texture", "part")
    same = Scene((RED, Thing("square", "red", x=0.75)), "grey", "a red circle to the left of a red square")
    assert "swap" not in alterations(same)
    rng = np.random.default_rng(0)
    _, (three, *_) = _scenes(1, SMALL, things=3)
    assert "part" not in alterations(three, SMALL)
    assert "part" in alterations(three, LARGE)
    for what in ("relation", "background"):
        with pytest.raises(ValueError, match=f"what must be one of shape, .*, part for this scene, got '{what}'"):
            altered(rng, plain, what=what)
