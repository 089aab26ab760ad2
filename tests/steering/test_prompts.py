"""Marked prompts against positions counted by hand."""

import types

import pytest

from difffast.models.tokenizer import clip_tokenizer, learn_merges
from difffast.steering.prompts import get_indices, parse_prompt

WORDS = (
    *("a", "an", "the", "and", "of", "by", "with", "wearing", "red", "black", "tall", "orange"),
    *("cat", "dog", "sunglasses", "hat", "car", "cup", "tea", "teddy", "bear"),
)


@pytest.fixture(scope="module")
def owner():
    """In place of a pipeline: every word of WORDS is one piece, others one a letter."""
    return types.SimpleNamespace(tokenizer=clip_tokenizer(learn_merges(WORDS)))


def positions(owner, prompt):
    return [(subject.nouns, subject.modifiers) for subject in parse_prompt(owner, prompt).subjects]


def test_everything_follows_from_the_marks(owner):
    prompt = parse_prompt(owner, "a [cat wearing sunglasses] and a [dog wearing a hat]")
    assert prompt.text == "a cat wearing sunglasses and a dog wearing a hat"
    assert prompt.length == 10
    assert [(g.nouns, g.modifiers, g.anchor, g.absorbed) for g in prompt.subjects] == [
        ((2,), (3, 4), 2, (3, 4)),
        ((7,), (8, 9, 10), 7, (8, 9, 10)),
    ]
    assert [g.phrase for g in prompt.subjects] == ["a cat wearing sunglasses", "a dog wearing a hat"]
    assert prompt.simplified == "a cat and a dog"
    assert prompt.simplified_length == 5


@pytest.mark.parametrize(
    ("prompt", "nouns", "modifiers"),
    [
        ("a [red car]", (3,), (2,)),
        ("the [cup of tea] by a cat", (2,), (3, 4)),
        ("a [*teddy *bear with a hat]", (2, 3), (4, 5, 6)),
        ("a [teddy bear]", (3,), (2,)),
        ("a [red *car black]", (3,), (2, 4)),
        ("a [red ox]", (3, 4), (2,)),  # two letters, two pieces
        ("[cat]", (1,), ()),
        ("a [red car], a cat", (3,), (2,)),
        ("a [cat]'s hat", (2,), ()),
    ],
)
def test_nouns_and_modifiers(owner, prompt, nouns, modifiers):
    assert positions(owner, prompt) == [(nouns, modifiers)]


def test_articles_follow_the_noun_that_is_left(owner):
    prompt = parse_prompt(owner, "An [orange cat] and a [tall orange] by the [black dog]")
    assert prompt.simplified == "A cat and an orange by the dog"
    assert [g.phrase for g in prompt.subjects] == ["An orange cat", "a tall orange", "the black dog"]


def test_a_prompt_without_marks_is_left_alone(owner):
    prompt = parse_prompt(owner, "a cat and a dog")
    assert (prompt.text, prompt.subjects, prompt.length) == ("a cat and a dog", (), 5)


def test_indices(owner):
    assert get_indices(owner, "a [red cat]") == {1: "a</w>", 2: "red</w>", 3: "cat</w>"}


def test_subjects_by_position(owner):
    prompt = parse_prompt(owner, "a red car and a cat wearing a hat", [((3,), (2,)), ((6,), (7, 8, 9))])
    assert [(g.nouns, g.modifiers) for g in prompt.subjects] == [((3,), (2,)), ((6,), (7, 8, 9))]
    assert [g.phrase for g in prompt.subjects] == ["red car", "cat wearing a hat"]
    assert prompt.simplified == "a car and a cat"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [cat", "must match"),
        ("a cat]", "must match"),
        ("a [red [cat]]", "must match"),
        ("a [] cat", "enclose a subject"),
        ("a [ ] cat", "enclose a subject"),
        ("a [c]at", "whole words"),
        ("a [*red big *car]", "one noun"),
        ("a [* car]", "right before a word"),
        ("a *cat and a [dog]", r"a star names a noun inside square brackets, got '\*cat' outside"),
        ("a [cat] " + "and a dog " * 25, "75 word pieces, got 77"),
    ],
)
def test_what_cannot_be_read_is_refused(owner, prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(owner, prompt)


def test_other_stars_are_characters(owner):
    """Of textual inversion, of products, and of prompts without brackets."""
    for text in ("a * and a cat", "2*cat", "a *cat", "*"):
        assert parse_prompt(owner, text).text == text
    assert parse_prompt(owner, "a * by a [red cat], 2*cat").text == "a * by a red cat, 2*cat"


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ([((), (2,))], "position of a noun"),
        ([((2,), (9,))], r"must lie in 1 \.\. 5"),
        ([((0,), ())], r"must lie in 1 \.\. 5"),
        ([((2,), (2,))], "one subject once"),
        ([((2,), ()), ((5,), (2,))], "one subject once"),
    ],
)
def test_bad_positions_are_refused(owner, subjects, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(owner, "a cat and a dog", subjects)


def test_two_tokenizers_must_agree(owner):
    # SDXL's second tokenizer pads by "!", which changes no position.
    padded = clip_tokenizer(learn_merges(WORDS))
    padded.pad_token = "!"
    both = types.SimpleNamespace(tokenizer=owner.tokenizer, tokenizer_2=padded)
    assert positions(both, "a [red car]") == [((3,), (2,))]
    both.tokenizer_2 = clip_tokenizer(learn_merges([word for word in WORDS if word != "red"]))
    with pytest.raises(ValueError, match="different pieces"):
        parse_prompt(both, "a [red car]")


def test_textual_inversion_moves_positions(owner):
    """One word that stands for three vectors takes three places."""
    owner = types.SimpleNamespace(
        tokenizer=owner.tokenizer, maybe_convert_prompt=lambda text, _: text.replace("tall", "a an and")
    )
    assert positions(owner, "tall and a [red car]") == [((7,), (6,))]


def test_a_tokenizer_is_needed():
    with pytest.raises(ValueError, match="no tokenizer"):
        parse_prompt(types.SimpleNamespace(), "a [cat]")
