"""engine="openvino" leaves a function to Python where that is the faster one, and says so."""

import json
import time

import pytest
import torch
from engine_histories import EngineHistory
from sampling import latents

from difffast import patch, patched
from difffast.engines import conversion, race
from difffast.engines.race import Verdict
from difffast.layers.transformed import count_bytes

pytest.importorskip("openvino", reason="the extra difffast[openvino] is not installed")

pytestmark = [
    pytest.mark.usefixtures("_one_thread", "models_folder"),
    pytest.mark.filterwarnings("ignore:Already"),  # PEFT, of what is fused or not already
]


@pytest.fixture
def _python_wins(monkeypatch):
    monkeypatch.setattr(race, "SHORTEST", 0)
    monkeypatch.setattr(race, "MARGIN", 1e9)


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize(
    ("model", "eager", "wins"),
    [
        ((0.25, 0.25, 0.25), (0.5, 0.02), True),  # the first call makes what layers keep
        ((0.25, 0.25, 0.25), (0.02, 0.5), True),
        ((0.12, 0.5, 0.5), (0.5, 0.2), False),
        ((0.5, 0.5, 0.12), (0.5, 0.2), False),
        ((0.2, 0.2, 0.2), (0.199, 0.199), False),  # not by enough
        ((0.01,), (), False),  # too short to tell
        ((0.2, 0.01), (), False),  # and the first one was kept waiting
    ],
)
def test_the_faster_one_wins(model, eager, wins, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(race, "SHORTEST", 0.1)

    def runner(name, seconds):
        left = iter(seconds)

        def run():
            calls.append(name)
            now[0] += next(left)

        return run

    verdict = race.race("f", runner("model", model), runner("eager", eager))
    assert verdict.eager_wins == wins
    assert verdict.model == pytest.approx(min(model))
    assert verdict.eager == (pytest.approx(min(eager)) if eager else None)
    assert calls == (["model", "model", "eager", "model", "eager"] if eager else ["model"] * len(model))


@pytest.mark.usefixtures("_python_wins")
def test_who_is_faster_is_told_and_known_to_the_next_process(one_level, models_folder, monkeypatch):
    with patched(one_level, "exact"):
        expected = latents(one_level, steps=2)
    with patched(one_level, "exact", engine="openvino") as report:
        assert torch.equal(latents(one_level, steps=2), expected)
        assert not report.last_run.reasons
        assert report.programs.kept == 0
        unet, text = report.programs.outrun
        assert unet.startswith("UNet2DConditionModel.run_whole ")
        assert text.startswith("CLIPTextModel.run_forward ")
        assert f"faster without: {unet}, {text}" in str(report.programs)
    assert not list(models_folder.glob("*.model"))

    def fail(*_):
        raise AssertionError("converted once more")

    with monkeypatch.context() as context:
        context.setattr(conversion, "convert", fail)
        one_level.unet.conv_out.weight.data.mul_(1.5)  # who is faster does not depend on the weights
        with patched(one_level, "exact"):
            expected = latents(one_level, steps=2)
        with patched(one_level, "exact", engine="openvino") as report:  # new engines, which have nothing but the files
            assert torch.equal(latents(one_level, steps=2), expected)
            assert report.programs.outrun == (unet, text)
            one_level.unet.conv_out.weight.data.mul_(0.5)
            changed = latents(one_level, steps=2)
            assert report.programs.outrun == (unet, text)
        with patched(one_level, "exact"):
            assert torch.equal(changed, latents(one_level, steps=2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text, content: json.dumps({**content, "kernels": "others"}),
        lambda text, content: text[:-3],
        lambda text, content: "[1]",
        lambda text, content: json.dumps({**content, "model": "fast"}),
        lambda text, content: json.dumps({"kernels": content["kernels"], "speed": 1}),
        lambda text, content: "",
    ],
    ids=["other kernels", "no JSON", "a list", "text for a number", "other fields", "nothing"],
)
def test_verdicts_of_other_kernels_and_damaged_ones_are_none(tmp_path, damage):
    file = tmp_path / "verdict.json"
    race.write(file, Verdict("f", 0.2, 0.1))
    assert race.read(file) == Verdict("f", 0.2, 0.1)
    text = file.read_text()
    file.write_text(damage(text, json.loads(text)))
    assert race.read(file) is None


@pytest.mark.usefixtures("_python_wins")
def test_a_verdict_that_is_none_is_found_anew(one_level, models_folder):
    with patched(one_level, "exact", engine="openvino"):
        expected = latents(one_level, steps=2)
    files = list(models_folder.glob("*.json"))
    assert len(files) == 2
    for file in files:
        file.write_text("")
    with patched(one_level, "exact", engine="openvino") as report:
        assert torch.equal(latents(one_level, steps=2), expected)
        assert not report.last_run.reasons
        assert len(report.programs.outrun) == 2
    assert all(race.read(file) is not None for file in files)


@pytest.mark.usefixtures("_python_wins")
@pytest.mark.parametrize("options", [{"fused": False}, {"precision": "bf16"}])
def test_what_computes_something_else_is_not_compared(one_level, options):
    """bfloat16 is asked for weights in float32; and stock layers are asked for, which no kernel makes faster."""
    with patched(one_level, "exact", engine="openvino", **options) as report:
        latents(one_level, steps=2)
        assert report.programs.kept == 2
        assert not report.programs.outrun
    with patched(one_level, "exact", engine="openvino") as report:
        latents(one_level, steps=2)
        assert report.programs.kept == 0


@pytest.mark.usefixtures("_python_wins")
def test_a_folder_that_cannot_be_written_only_costs_time(one_level, models_folder):
    models_folder.parent.joinpath("openvino").write_text("no folder")
    with patched(one_level, "exact"):
        expected = latents(one_level, steps=2)
    with patched(one_level, "exact", engine="openvino") as report:
        assert torch.equal(latents(one_level, steps=2), expected)
        assert len(report.programs.outrun) == 2


@pytest.mark.usefixtures("_python_wins")
def test_the_vae_is_fused_where_python_is_faster(pipe):
    with patched(pipe, "exact"):
        expected = picture(pipe)
    with patched(pipe, "exact", engine="openvino") as report:
        assert torch.equal(picture(pipe), expected)
        assert any(each.startswith("Decoder.run_forward") for each in report.programs.outrun)


def test_what_loses_leaves_no_transformed_weights(pipe, monkeypatch):
    monkeypatch.setattr(race, "SHORTEST", 0)
    monkeypatch.setattr(race, "MARGIN", 0)
    with patched(pipe, "exact") as report:
        latents(pipe, steps=2)
        assert count_bytes([pipe.unet])
    with patched(pipe, "exact", engine="openvino") as report:
        latents(pipe, steps=2)
        assert report.programs.kept
        assert not count_bytes([pipe.unet])


@pytest.mark.usefixtures("_python_wins")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_histories_where_python_is_faster(seed):
    EngineHistory(seed, lambda pipe: patch(pipe, "exact", engine="openvino")).play(draws=6 + 20 * seed)


def test_a_verdict_says_what_it_is():
    assert str(Verdict("f", 5.678, 1.234)) == "f 1.23 s a call, by its model 5.68"


def test_who_loses_is_not_asked_again(one_level, models_folder, monkeypatch):
    with patched(one_level, "exact", engine="openvino", fused=False):
        latents(one_level, steps=2)  # leaves the text encoder's model, and no verdict
    with patched(one_level, "exact", engine="openvino") as report:
        latents(one_level, steps=2)
        assert report.programs.kept == 2
    assert len(list(models_folder.glob("*.json"))) == 2
    monkeypatch.setattr(race, "race", None)
    with patched(one_level, "exact", engine="openvino") as report:
        latents(one_level, steps=2)
        assert (report.programs.kept, report.programs.loaded) == (2, 2)
