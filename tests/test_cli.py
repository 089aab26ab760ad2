import json
import subprocess
import warnings
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import difffast
from difffast.tools import binding_demo, cli, demo, terminal
from difffast.tools.demo import PROMPTS, psnr

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small_demo(monkeypatch, pipe):
    monkeypatch.setattr(difffast.models, "embedded_pipeline", lambda: pipe)


def test_info_names_versions_backends_and_presets(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "diffusers", "backend reference", "backend cpp", "info --pipeline", "balanced"):
        assert word in text


def test_info_about_a_pipeline_on_disk(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "pipeline")
    assert cli.main(["info", "--pipeline", str(tmp_path / "pipeline")]) == 0
    assert "StableDiffusionPipeline is supported: encoder propagation" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert cli.main(["info", "--pipeline", str(tmp_path)]) == 1
    assert "FluxPipeline is not supported" in capsys.readouterr().out
    assert cli.main(["info", "--pipeline", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("index", "answer"),
    [
        ({"_class_name": "StableDiffusionSAGPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, "deprecated in"),
        ({"_class_name": "OwnPipeline", "unet": ["diffusers", "UNet2DModel"]}, "how it samples is not known"),
        ({"_class_name": "OwnPipeline", "unet": ["diffusers", "UNet1DModel"]}, None),
        ({"_class_name": "UnCLIPPipeline", "decoder": ["diffusers", "UNet2DConditionModel"]}, None),
    ],
)
def test_info_about_a_pipeline_that_shares_nothing(index, answer, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert cli.main(["info", "--pipeline", str(tmp_path)]) == (answer is None)
    text = " ".join(capsys.readouterr().out.split())
    assert (answer or f"{index['_class_name']} is not supported") in text
    assert ("can only have what is exact, difffast.patch(pipe, 'exact')" in text) == (answer is not None)


def test_info_says_which_kernels_are_proved(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "console", Console(width=200))
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(cell.strip() for cell in line.split("│")[1:4]) for line in lines if "│" in line}
    for operator, backends in difffast.ops.OPERATORS.items():
        for backend in backends:
            (state,) = [row[2] for row in rows if row[:2] == (operator, backend)]
            proved = [p.architecture for p in difffast.ops.PROVED if (p.operator, p.backend) == (operator, backend)]
            plain = ["opt-in, or where a proof finds it faster"]
            if backend in ("reference", "sdpa", "onednn"):
                plain = ["plain PyTorch"]
            if backend in ("flash", "cudnn", "efficient"):
                plain = ["PyTorch's: where a proof finds it faster"]
            assert state in (proved or plain)
    assert ("cross_attention", "cuda", "opt-in, or where a proof finds it faster") in rows
    assert "never a default" in "\n".join(lines)


def test_info_gives_the_reason_for_a_missing_backend(capsys, monkeypatch):
    monkeypatch.setattr(difffast.ops, "missing", lambda backend: "no compiler was found")
    assert cli.main(["info"]) == 0
    assert "no compiler was found" in capsys.readouterr().out


def test_demo_writes_a_grid_and_the_numbers(small_demo, tmp_path, capsys):
    options = ("--steps", "10", "--seeds", "2", "--preset", "faster-diffusion")
    assert cli.main(["demo", "--out", str(tmp_path), *options]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 6 * 160
        assert grid.size[1] > 3 * 160
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in numbers["rows"]] == [(p, s) for p in PROMPTS for s in (0, 1)]
    assert all(row["psnr_db"] > 20 and row["stock_s"] > 0 and row["patched_s"] > 0 for row in numbers["rows"])
    assert numbers["steps"] == 10
    text = capsys.readouterr().out
    for word in ("speed-up", "PSNR", "6 of 10 steps run the encoder"):
        assert word in text


def test_demo_of_binding_draws_maps(small_demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(binding_demo, "PROMPTS", ("a [red ox] and a [cat]",))
    monkeypatch.setitem(binding_demo.EMBEDDED, "bind_step_size", 1.0)
    options = ("--steps", "8", "--seeds", "2", "--binding", "attribute", "--preset", "exact")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "difffast: semantic binding diverged")  # weights are random
        assert cli.main(["demo", "--out", str(tmp_path), *options]) == 0
    with Image.open(tmp_path / "binding.png") as grid:
        assert grid.size[0] > 4 * 160
        assert grid.size[1] > 2 * 160
    text = capsys.readouterr().out
    assert "focus" in text
    assert "written" in text
    assert " ".join(binding_demo.explain("attribute").split()[-5:]) in " ".join(text.split())


def test_demo_of_binding_says_what_was_measured():
    rows = json.loads((ROOT / "bench" / "results" / "binding.json").read_text())["rows"]
    for preset, shares in binding_demo.MEASURED.items():
        bound = rows[f"{preset}, the model's numbers"]
        for kind, pair in zip(("leakage", "full_binding"), shares, strict=True):
            assert pair == tuple(round(100 * row[kind], 1) for row in (rows["stock"], bound))
        assert bound["full_binding_points_gained"][2] < 0, "worse, and not by chance"


def test_psnr():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (255, 255, 255))
    assert psnr(black, black) == float("inf")
    assert psnr(black, grey) == pytest.approx(0.0)


@pytest.mark.parametrize("preset", ["faster-diffusion", "stock"])
def test_generate_from_a_folder(pipe, tmp_path, capsys, preset):
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "deep" / "image.png"
    arguments = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a red circle", "--steps", "10"]
    assert cli.main([*arguments, "--preset", preset, "--out", str(out), "--device", "cpu"]) == 0
    with Image.open(out) as image:
        assert image.size == (32, 32)
    text = capsys.readouterr().out
    assert ("propagated" in text) == (preset != "stock")


def test_errors_are_one_line_and_a_status(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert cli.main(["generate", "--model", str(missing), "--prompt", "x"]) == 2
    assert "error" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--steps", "0"], ["demo", "--preset", "fastest"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: difffast" in capsys.readouterr().err


def test_bench_is_forwarded_to_the_checkout(monkeypatch):
    ran = []

    def run(command):
        ran.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    options = ["--only", "unet", "--budget-minutes", "3"]
    assert cli.main(["bench", *options]) == 3
    assert cli.main(["bench"]) == 3
    assert cli.main(["bench", "--help"]) == 3
    script = str(Path(__file__).resolve().parents[1] / "bench" / "run.py")
    assert [command[1:] for command in ran] == [[script, *options], [script], [script, "--help"]]


def test_bench_needs_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(difffast, "__file__", str(tmp_path / "site-packages" / "difffast" / "__init__.py"))
    assert cli.main(["bench", "--size", "cpu"]) == 2
    assert "difffast bench needs a checkout of the repository" in " ".join(capsys.readouterr().out.split())


def test_grid_shows_what_it_is_given(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    result = demo.Comparison("p", 0, 2.0, 1.0, 5.0, (red, blue))
    demo.draw_grid([result], tmp_path / "grid.png", cell=16)
    with Image.open(tmp_path / "grid.png") as grid:
        row = 22 + 8
        assert grid.getpixel((6 + 8, row)) == (255, 0, 0)
        assert grid.getpixel((6 + 22 + 8, row)) == (0, 0, 255)
        assert grid.getpixel((6 + 44 + 8, row)) == (255, 0, 255)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must name the pipeline's class as a string under _class_name, got None"),
        ('{"_class_name": ["a", "b"]}', r"under _class_name, got ['a', 'b']"),
        ("[]", "under _class_name, got None"),
        ("{", "is no JSON that can be read: "),
        ("\xff", "is no JSON that can be read: "),
        ("[" * 100_000, "is no JSON that can be read: "),
    ],
)
def test_a_broken_index_is_one_sentence(tmp_path, capsys, content, message):
    folder = tmp_path / "[" / "x]"  # "[/x]" is markup to rich
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_bytes(content.encode("latin-1"))
    assert cli.main(["info", "--pipeline", str(folder)]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"error: {folder / 'model_index.json'} ")
    assert message in out
    assert len(out.splitlines()) == 1


def test_info_answers_first_and_lists_on_request(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path)
    assert cli.main(["info", "--pipeline", str(tmp_path)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[0].startswith("StableDiffusionPipeline is supported: encoder propagation")
    )
    assert cli.main(["info", "--pipelines"]) == 0
    assert "GLIGEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "picture.doc"], "--out must end as a picture does (.png, .jpg, ...), got picture.doc"),
        (["--out", "picture"], "got picture"),
        (["--out", "{file}/picture.png"], "file"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here: "),
        (["--device", "toaster"], "--device toaster cannot be used here: "),
        (["--model", "[/nowhere]"], "[/nowhere]"),
    ],
)
def test_generate_refuses_before_anything_is_made(pipe, tmp_path, capsys, monkeypatch, options, message):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("it runs"))
    options = [each.replace("{file}", str(tmp_path / "file")) for each in options]
    assert cli.main(["generate", "--model", str(tmp_path / "model"), "--prompt", "a", *options]) == 2
    out = capsys.readouterr().out
    assert out.startswith("error: ")
    assert message in out
    assert not list(tmp_path.glob("**/picture*"))


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--out", "{file}/deep"],
        ["demo", "--binding", "attribute", "--out", "{file}/deep"],
        ["profile", "--out", "{file}/deep"],
        ["prove", "--report", "{file}/deep/report.json"],
        ["prove", "--report", "{folder}"],
        ["prove"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_what_cannot_be_written_before_it_begins(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    for name in ("embedded_pipeline", "load_pipeline"):
        monkeypatch.setattr(difffast.models, name, lambda *_: pytest.fail("it is loaded"))
    monkeypatch.setattr("difffast.proofs.run.prove", lambda *_, **__: pytest.fail("it proves"))
    if command[1:] == []:  # what it finds out could not be kept
        monkeypatch.setenv("DIFFFAST_CACHE", str(tmp_path / "file" / "deep"))
    words = [each.replace("{file}", str(tmp_path / "file")).replace("{folder}", str(tmp_path)) for each in command]
    assert cli.main(words) == 2
    out = capsys.readouterr().out
    assert out.startswith("error: ")
    assert str(tmp_path) in out
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_picture_leaves_the_earlier_one(pipe, tmp_path, capsys, monkeypatch):
    """With a real signal: test_interrupted_commands.py."""

    def save_half(_image, path):
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "image.png"
    out.write_text("an earlier picture")
    monkeypatch.setattr(Image.Image, "save", save_half)
    options = ["--model", str(tmp_path / "model"), "--prompt", "a", "--steps", "2", "--preset", "stock"]
    assert cli.main(["generate", *options, "--device", "cpu", "--out", str(out)]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted: no file was left half written."
    assert out.read_text() == "an earlier picture"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["image.png", "model"]
