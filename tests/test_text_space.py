"""The report of the text space: what it asks of a model, and where it is written."""

import pytest
import text_space
import torch
from drawn.vocabulary import SMALL
from PIL import Image

from difffast import models
from difffast.models.embedded import check, write_checksums

_SUMS = {"colour_and_noun": 0.5, "noun_alone": 0.1, "one_noun": 0.2, "other_noun": 0.3, "both_nouns": 0.4}
_ENDS = {f"{name}_{kind}": 0.25 for name in ("words", "ends") for kind in ("shape", "colour", "both")}
RECORD = {
    "pictures": 96,
    "steps": 50,
    "retrieval": {"batch": 128, "text_to_picture": 0.87, "pairs": 0.93},
    "cosines": {"nouns": 0.5, "colours": 0.25},
    "ends": _ENDS,
    "sums": _SUMS,
    "binding": {"1": {"presence": 1.0, "binding": 0.75, "extra": 0.125}},
}


@pytest.fixture(scope="module")
def studio():
    pipe = models.embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return text_space.Studio(pipe, SMALL, 1)


def test_a_prompts_own_rows_draw_what_the_prompt_draws(studio):
    (image,) = studio.draw(studio.rows(["a red circle"]), "own")
    generator = torch.Generator().manual_seed(text_space.SEED)
    (expected,) = studio.pipe("a red circle", num_inference_steps=1, generator=[generator]).images
    assert image.tobytes() == expected.tobytes()


def test_every_question_has_shares(studio):
    for shares in (text_space.replace_ends(studio, 2), text_space.add_rows(studio, 2)):
        assert all(0 <= value <= 1 for value in shares.values())
    assert set(text_space.replace_ends(studio, 1)) == set(_ENDS)
    assert set(text_space.add_rows(studio, 1)) == set(_SUMS)
    assert list(text_space.bind(studio, 1)) == ["1", "2", "3"]
    assert -1 <= text_space.cosines(studio)["nouns"] <= 1


def test_pairs_are_of_two_shapes_and_two_colours():
    pairs = text_space.pairs_of_things(SMALL, 40)
    assert all(a.shape != b.shape and a.colour != b.colour for a, b in pairs)
    assert pairs == text_space.pairs_of_things(SMALL, 40)


def test_shares_are_of_pictures(studio):
    blank = Image.new("RGB", (64, 64), "white")
    red = blank.copy()
    red.paste((222, 30, 38), (16, 16, 48, 48))
    shown = text_space.share([blank, red], lambda n, seen: ("square", "red") in seen, studio)
    assert shown == 0.5


def test_the_section_goes_into_the_card_once(tmp_path):
    (tmp_path / "README.md").write_text("# A model\n\nSome words.\n\nLicence: Apache-2.0.\n")
    write_checksums(tmp_path)
    for _ in range(2):
        text_space.put_into_card(tmp_path, text_space.describe(RECORD))
    card = (tmp_path / "README.md").read_text()
    assert card.count(text_space.HEADING) == 1
    assert card.startswith("# A model\n\nSome words.\n\n## Its text space\n")
    assert card.endswith("\nLicence: Apache-2.0.\n")
    assert "among 128" in card
    assert "| 1 | 100% | 75% | 0.12 |" in card
    check(tmp_path)


def test_a_card_without_a_licence_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# A model\n")
    with pytest.raises(ValueError, match=r"README\.md has no line that begins with 'Licence:'"):
        text_space.put_into_card(tmp_path, "")
