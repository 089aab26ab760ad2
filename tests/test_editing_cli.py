"""``difffast suppress`` and ``difffast edit``."""

import pytest
from PIL import Image

import difffast
from difffast.tools.cli import main


@pytest.fixture
def _small(pipe, monkeypatch):
    monkeypatch.setattr(difffast.models, "embedded_pipeline", lambda: pipe)


def size(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("more", [[], ["--optimise"], ["--strengthen"]])
def test_suppress_writes_two_pictures(tmp_path, more):
    out = tmp_path / "out.png"
    given = ["suppress", "--prompt", "a ox by elk", "--words", "ox", "elk", "--steps", "3", "--out", str(out), *more]
    assert main(given) == 0
    assert size(out) == (64, 32)


@pytest.mark.usefixtures("_small")
def test_edit_writes_two_pictures_of_a_generated_and_of_a_real_one(tmp_path):
    out = tmp_path / "out.png"
    prompts = ["edit", "--source", "a ox in fog", "--target", "a elk in fog", "--steps", "2", "--out", str(out)]
    assert main(prompts) == 0
    assert size(out) == (64, 32)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "real.png")
    assert main([*prompts, "--image", str(tmp_path / "real.png"), "--blend", "ox", "elk"]) == 0
    assert size(out) == (64, 32)


@pytest.mark.usefixtures("_small")
def test_what_is_wrong_is_said_without_a_traceback(tmp_path, capsys):
    given = ["suppress", "--prompt", "a ox", "--steps", "2", "--out", str(tmp_path / "out.png"), "--words"]
    assert main([*given, "cat"]) == 2
    assert "no word 'cat' in the prompt 'a ox'" in capsys.readouterr().out
    assert main([*given, "ox", "--optimise", "--strengthen"]) == 2
    assert not (tmp_path / "out.png").exists()
