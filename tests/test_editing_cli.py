"""``difffast suppress`` and ``difffast edit``."""

import pytest
import zoo
from PIL import Image

import difffast
from difffast.steering.inversion import null_text, style
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
@pytest.mark.parametrize("optimise", [False, True])
def test_reencoding_is_handed_on(tmp_path, monkeypatch, optimise):
    made, name = {}, "Suppression" if optimise else "suppress"
    plain = getattr(difffast, name)
    monkeypatch.setattr(difffast, name, lambda *a, **more: (made.update(more), plain(*a, **more))[1])
    given = ["suppress", "--prompt", "a ox by elk", "--words", "ox", "--steps", "2", *["--optimise"] * optimise]
    for extra in ([], ["--reencode"]):
        assert main([*given, *extra, "--out", str(tmp_path / "out.png")]) == 0
        assert made["reencode"] is bool(extra)
    assert size(tmp_path / "out.png") == (64, 32)


@pytest.mark.usefixtures("_small")
def test_edit_writes_two_pictures_of_a_generated_and_of_a_real_one(tmp_path, pipe):
    out = tmp_path / "out.png"
    prompts = ["edit", "--source", "a ox in fog", "--target", "a elk in fog", "--steps", "2", "--out", str(out)]
    assert main(prompts) == 0
    assert size(out) == (64, 32)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "real.png")
    blended = [*prompts, "--image", str(tmp_path / "real.png"), "--blend", "ox", "elk"]
    assert main(blended) == 2  # the small UNet has no layers for it
    pipe.unet = zoo.three_levels()
    assert main(blended) == 0
    assert size(out) == (64, 32)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("method", [None, "ddim", "npi", "null", "style", "ddcm"])
def test_the_inversion_can_be_chosen(tmp_path, monkeypatch, method):
    chosen, plain, out = [], difffast.invert, tmp_path / "out.png"

    def invert(pipe, image, prompt, method, **more):
        chosen.append(method)
        return plain(pipe, image, prompt, method, **more)

    monkeypatch.setattr(difffast, "invert", invert)
    for module in (null_text, style):
        monkeypatch.setattr(module, "_UPDATES", 2)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "real.png")
    given = ["edit", "--source", "a ox", "--target", "a elk", "--steps", "2", "--image", str(tmp_path / "real.png")]
    assert main([*given, "--out", str(out), *(() if method is None else ("--inversion", method))]) == 0
    assert chosen == [method or "direct"]
    assert size(out) == (64, 32)


@pytest.mark.usefixtures("_small")
def test_what_is_wrong_is_said_without_a_traceback(tmp_path, capsys):
    given = ["suppress", "--prompt", "a ox", "--steps", "2", "--out", str(tmp_path / "out.png"), "--words"]
    assert main([*given, "cat"]) == 2
    assert "no word 'cat' in the prompt 'a ox'" in capsys.readouterr().out
    assert main([*given, "ox", "--optimise", "--strengthen"]) == 2
    assert main([*given, "ox", "--reencode", "--strengthen"]) == 2
    given = ["edit", "--source", "a ox", "--target", "a elk", "--out", str(tmp_path / "out.png"), "--inversion"]
    assert main([*given, "null"]) == 2
    assert "--inversion null needs a picture to invert: --image" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*given, "edict"])  # its pictures come from a loop of their own
    assert not (tmp_path / "out.png").exists()
