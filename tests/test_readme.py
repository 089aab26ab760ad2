"""The README claims nothing that the repository does not hold."""

import re
import shlex
import warnings
from pathlib import Path

import run
import tables
import torch
from PIL import Image

import difffast
from difffast.tools import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_come_from_committed_results():
    assert re.findall(r"<!-- table (\w+) -->", README), "the README has generated tables"
    assert tables.render(README) == README, "run `make readme`"


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    for path in pictures:
        with Image.open(ROOT / path) as picture:
            assert picture.size[0] > 500


def test_commands_exist():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    makefile = (ROOT / "Makefile").read_text()
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
        elif words and words[0].endswith("difffast"):
            arguments = cli._parser().parse_args(words[1:])
            if words[1] == "bench":
                run.make_parser().parse_args(arguments.forwarded)


def test_the_examples_run(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"pipe": pipe, "prompt": "a red circle", "difffast": difffast}
    rows = {"q": 64, "k": 77, "v": 77, "text_k": 9, "text_v": 9}
    names.update({name: torch.randn(2, 4, n, 32) for name, n in rows.items()})
    names.update(x=torch.randn(2, 9, 5), weight=torch.randn(7, 5), bias=torch.randn(7))
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 6
    try:
        with warnings.catch_warnings():
            # ToMe's step sizes are for trained models; this one is random.
            warnings.filterwarnings("ignore", "difffast: semantic binding diverged")
            for code in blocks:
                exec(code, names)
    finally:
        difffast.unpatch(pipe)
    assert names["image"].size == (32, 32)
    assert names["picture"].shape[1] == 2
    assert names["cats"].ndim == 2
    assert names["loss"].shape == (2,)
