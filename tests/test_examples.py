"""Every example runs as it stands and writes what it says."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import difffast
from difffast.layers.registry import LAYERS

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def _embedded():
    pipe = difffast.models.embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run(_embedded, tmp_path, monkeypatch):
    """Run an example with arguments, in an empty folder; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(difffast.models, "embedded_pipeline", lambda: copy.deepcopy(_embedded))
    kinds = list(LAYERS)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(FOLDER / name), run_name="__main__")

    yield run
    LAYERS[:] = kinds


def size(path):
    with Image.open(path) as picture:
        return picture.size


def test_patch_and_compare(run, capsys):
    run("patch_and_compare.py", "--steps", "9", "--preset", "faster-diffusion")
    assert size("compare.png") == (512, 256)
    assert "PSNR" in capsys.readouterr().out
    run("patch_and_compare.py", "--steps", "2", "--preset", "exact")
    assert "preset" in capsys.readouterr().out


def test_presets_and_plans(run):
    run("presets_and_plans.py", "--steps", "40", "--out", "plans")
    plans = {name: json.loads(Path(f"plans/{name}.json").read_text()) for name in difffast.presets.PRESETS}
    assert len(plans["exact"]["key_steps"]) == 40
    assert len(plans["turbo"]["key_steps"]) < len(plans["balanced"]["key_steps"]) < 40
    assert all(size(f"plans/{name}.png")[0] > 500 for name in plans)


def test_tune_for_a_budget(run):
    names = run("tune_for_a_budget.py", "--steps", "8", "--budget", "0", "--repeats", "1")
    assert names["tuning"].candidate == names["tuning"].rows[0].candidate  # the fastest one of all
    assert len(names["tuning"].rows) == 6
    assert size("tuning/front.png")[0] > 500
    assert json.loads(Path("tuning/measurements.json").read_text())


def test_attention_maps(run, capsys):
    names = run("attention_maps.py", "--steps", "4")
    assert size("maps.png")[0] > 128 * 7  # a green star and a red ring
    assert names["maps"].locate("star").shape == (1, 16, 16)
    said = capsys.readouterr().out
    assert "star 3" in said
    assert "ring (1, 16, 16)" in said


def test_semantic_binding(run):
    names = run("semantic_binding.py", "--steps", "4")
    assert size("binding.png") == (512, 256)
    assert names["report"].trace.subjects[0] == ("a dotted green star", "a striped orange ring")
    assert names["report"].trace.steps


def test_erase_a_concept(run, capsys):
    names = run("erase_a_concept.py", "--steps", "2")
    assert size("erased.png") == (512, 256)
    assert "erased: 'a red circle'" in capsys.readouterr().out
    assert (names["before"] != names["erased"]).any()


def test_operators(run):
    run("operators.py", "--queries", "64")
    errors = json.loads(Path("operators.json").read_text())
    assert len(errors) == 3
    assert max(errors.values()) < 1e-4


def test_several_processes(run, capsys):
    """By two processes: test_distributed.py."""
    run("several_processes.py", "--steps", "2")
    assert size("picture.png") == (64, 64)
    assert "2 key steps" in capsys.readouterr().out


def test_own_layer_kind(run):
    names = run("own_layer_kind.py", "--steps", "8")
    assert "transformer norms (11)" in Path("report.txt").read_text()
    assert names["difference"] < 1e-4


def test_suppress_words(run):
    names = run("suppress_words.py", "--steps", "5")
    assert size("suppressed.png") == (768, 256)
    assert len({each.tobytes() for each in names["pictures"]}) == 3
    assert names["report"].trace.removed == ((6, 7),)


def test_edit_by_prompt(run):
    names = run("edit_by_prompt.py", "--steps", "4")
    assert size("edited.png") == (1024, 256)
    assert names["before"].tobytes() != names["after"].tobytes()
    assert Path("inversion.safetensors").is_file()


def test_negative_prompts(run):
    names = run("negative_prompts.py", "--steps", "3")
    assert size("negative.png") == (512, 256)
    assert names["pictures"][0].tobytes() != names["pictures"][1].tobytes()


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in FOLDER.glob("*.py")} <= tested
