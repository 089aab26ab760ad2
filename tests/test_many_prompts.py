"""difffast generate --prompts, by one process and by several on gloo."""

import json
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import ranks
import ranks_prompts
import torch
from PIL import Image

import difffast
from difffast.tools import cli
from difffast.tools.prompt_files import Job, Manifest, read_prompts

PROMPTS = ("a red circle", "a blue ring", "a hat", "a green star", "a cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = difffast.models.tiny_pipeline("sd", channels=(32, 64), sample_size=8)
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """The pictures, drawn by the stock pipeline: line n with seed 5 + n - 1."""
    pipe = difffast.models.load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, seed):
        generator = torch.Generator().manual_seed(seed)
        image = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
        return np.asarray(image, np.int16)

    return [draw(prompt, 5 + index) for index, prompt in enumerate(PROMPTS)]


def options(model, out, *more):
    prompts = ("--prompts", str(model / "prompts.txt"), "--out", str(out))
    return ("--model", str(model), *prompts, "--seed", "5", "--guidance-scale", "3.0", *more)


def records(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def check_pictures(out, expected, lines=range(1, 6)):
    made = sorted((each for each in records(out) if "file" in each), key=lambda each: each["line"])
    assert [(each["line"], each["prompt"], each["seed"]) for each in made] == [
        (n, PROMPTS[n - 1], n + 4) for n in lines
    ]
    hidden = {".manifest.jsonl.lock"}
    assert {each.name for each in out.iterdir()} - hidden == {"manifest.jsonl", *(each["file"] for each in made)}
    for each in made:
        assert each["seconds"] > 0
        assert each["settings"]["steps"] == 2
        assert each["settings"]["guidance_scale"] == 3.0
        with Image.open(out / each["file"]) as image:
            assert np.abs(np.asarray(image, np.int16) - expected[each["line"] - 1]).max() <= 1


def test_a_process_alone_makes_a_picture_for_each_line(model, tmp_path, expected):
    assert ranks_prompts.generate(*options(model, tmp_path))[0] == 0
    check_pictures(tmp_path, expected)
    status, text = ranks_prompts.generate(*options(model, tmp_path))
    assert status == 0
    assert "0 pictures made, 0 failed, 5 were there" in text
    assert len(records(tmp_path)) == 5


def test_two_processes_make_the_same_pictures(model, tmp_path, expected):
    (first, text), second = ranks.run(2, ranks_prompts.generate, *options(model, tmp_path))
    assert (first, second[0]) == (0, 0), text + second[1]
    assert "5 pictures made, 0 failed, 0 were there" in text
    assert "5/5" in text
    assert second[1] == "", "only the first process speaks"
    check_pictures(tmp_path, expected)


def test_what_is_missing_is_made_and_nothing_else(model, tmp_path, expected):
    ranks_prompts.generate(*options(model, tmp_path))
    made = {each["line"]: tmp_path / each["file"] for each in records(tmp_path)}
    times = {line: path.stat().st_mtime_ns for line, path in made.items()}
    made[2].unlink()
    made[3].unlink()
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"line": 9, "prom')  # of a process that was killed
    results = ranks.run(2, ranks_prompts.generate, *options(model, tmp_path))
    assert [status for status, _ in results] == [0, 0]
    assert "2 pictures made, 0 failed, 3 were there" in results[0][1]
    assert [line for line, path in made.items() if path.stat().st_mtime_ns != times[line]] == [2, 3]
    # Other settings are other pictures, beside these.
    assert ranks_prompts.generate(*options(model, tmp_path, "--steps", "1"))[0] == 0
    assert len(list(tmp_path.glob("*.png"))) == 10


def test_a_prompt_that_fails_is_reported_and_the_rest_goes_on(model, tmp_path, expected):
    arguments = options(model, tmp_path), PROMPTS[1]
    results = ranks.run(2, ranks_prompts.generate_broken, *arguments)
    assert [status for status, _ in results] == [1, 1]
    assert "failed: line 2, 'a blue ring': RuntimeError: this prompt cannot be drawn" in results[0][1]
    assert "4 pictures made, 1 failed" in results[0][1]
    check_pictures(tmp_path, expected, [1, 3, 4, 5])
    (failed,) = [each for each in records(tmp_path) if "error" in each]
    assert (failed["line"], failed["prompt"], failed["error"]) == (
        2,
        "a blue ring",
        "RuntimeError: this prompt cannot be drawn",
    )


@pytest.mark.parametrize(
    ("mesh", "what", "made"),
    [("dp=2", "which pictures failed", [1, 2, 3, 5]), ("cfg=2", "the latents of a run", [1, 2, 3])],
)
def test_a_process_that_is_killed_ends_the_others_with_an_error_and_a_later_run_makes_the_rest(
    model, tmp_path, expected, mesh, what, made
):
    """Process 1 ends at the fourth prompt; along "cfg", process 0 is then in the middle of the same picture."""
    arguments = options(model, tmp_path, "--mesh", mesh, "--timeout", "60"), 1, PROMPTS[3]
    first, second = ranks.run(2, ranks_prompts.generate_killed, *arguments)
    assert isinstance(second, ranks.Killed)
    assert first[0] == 2
    assert f"error: process 0 could not exchange {what} with processes [1]" in first[1]
    check_pictures(tmp_path, expected, made)
    results = ranks.run(4, ranks_prompts.generate, *options(model, tmp_path))
    assert [status for status, _ in results] == [0] * 4
    assert f"{5 - len(made)} pictures made, 0 failed, {len(made)} were there" in results[0][1]
    check_pictures(tmp_path, expected)


@pytest.mark.slow
def test_two_nodes_make_the_same_pictures(model, tmp_path, expected):
    """Two launchers with a process each, as on two machines: both processes are the first ones of their node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    command = ["difffast.tools.cli", "generate", *options(model, tmp_path), "--steps", "2", "--device", "cpu"]
    start = [sys.executable, "-m", *launcher, "-m", *command, "--preset", "exact"]
    nodes = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [node.communicate(timeout=500)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert sum("5 pictures made, 0 failed, 0 were there" in text for text in texts) == 1
    check_pictures(tmp_path, expected)


def test_commands_that_know_nothing_of_each_other_leave_every_file_whole(model, tmp_path, expected):
    results = ranks.run(3, ranks_prompts.generate_alone, *options(model, tmp_path))
    assert [status for status, _ in results] == [0] * 3
    check_pictures(tmp_path, expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\n\nb\n", "line 2: a line must hold a prompt, and this one is empty"),
        (b"a\n \t\nb", "line 2: a line must hold a prompt"),
        (b"", "has no prompts"),
        (b"a\nb\xff\n", "line 2: a prompt must be UTF-8"),
        (b"a\n" + 76 * b"b", "line 2: a prompt must have at most 77 tokens, .* and this one has 78"),
    ],
    ids=["empty", "blank", "nothing", "not UTF-8", "overlong"],
)
def test_bad_files_of_prompts_are_refused_with_the_line(model, tmp_path, capsys, content, reason):
    (tmp_path / "prompts").write_bytes(content)
    command = ["generate", "--model", str(model), "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "o")]
    assert cli.main([*command, "--device", "cpu", "--preset", "stock", "--steps", "1"]) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("error: ")
    assert re.search(reason, text), text
    assert list((tmp_path / "o").glob("*.png")) == []


def test_prompts_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(b'\xef\xbb\xbfein B\xc3\xa4r\r\n  a, "b" \r\nlast')
    assert read_prompts(path) == ["ein Bär", 'a, "b"', "last"]


def test_a_picture_is_named_after_all_that_it_depends_on():
    one = Job(3, "a", 7, {"steps": 2})
    assert one.file.startswith("00003-")
    assert one.file == Job(3, "a", 7, {"steps": 2}).file
    others = [Job(3, "b", 7, {"steps": 2}), Job(3, "a", 8, {"steps": 2}), Job(3, "a", 7, {"steps": 3})]
    assert len({each.file for each in (one, *others)}) == 4


def test_a_manifest_holds_a_picture_once_and_skips_half_lines(tmp_path):
    ours, theirs = Manifest(tmp_path), Manifest(tmp_path)
    ours.add({"file": "a.png"})
    theirs.add({"file": "a.png"})
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"file": "b')
    ours.add({"file": "c.png"})
    theirs.add({"error": "none"})
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert lines == ['{"file": "a.png"}', '{"file": "b', '{"file": "c.png"}', '{"error": "none"}']
    (tmp_path / "c.png").touch()
    assert ours.find_made() == theirs.find_made() == {"c.png"}


def test_a_mesh_is_for_several_processes(model, tmp_path, capsys):
    command = ["generate", "--model", str(model), "--out", str(tmp_path / "o"), "--mesh", "cfg=2"]
    assert cli.main([*command, "--prompt", "a"]) == 2
    assert "one prompt is made by one process" in capsys.readouterr().out
    assert cli.main([*command, "--prompts", str(model / "prompts.txt"), "--device", "cpu"]) == 2
    assert "needs processes that torchrun has started, and there is one" in capsys.readouterr().out
