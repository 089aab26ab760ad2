"""README and docs claim nothing that the repository does not hold."""

import copy
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import tables
import torch
from PIL import Image

import difffast
from difffast.layers.registry import LAYERS
from difffast.tools import cli

ROOT = Path(__file__).resolve().parents[1]
WITH_TABLES = tables.find_pages()
PAGES = [*WITH_TABLES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CODE = re.compile(r"```(\w*)\n(.*?)```", re.S)


def blocks(page, language):
    return [code for found, code in CODE.findall(page.read_text()) if found == language]


def prose(page):
    return CODE.sub("", page.read_text())


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def by_name(page):
    return page.relative_to(ROOT).as_posix()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", WITH_TABLES, ids=by_name)
def test_tables_come_from_committed_results(page):
    assert tables.render(page.read_text()) == page.read_text(), "run `make readme`"


def test_every_table_is_shown_once():
    shown = [name for page in WITH_TABLES for name in re.findall(r"<!-- table (\w+) -->", page.read_text())]
    assert sorted(shown) == sorted(tables.TABLES)
    assert "<!-- table presets -->" in (ROOT / "README.md").read_text()


def test_pictures_exist():
    pictures = [page.parent / path for page in PAGES for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", prose(page))]
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size[0] > 500


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {path}"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
        elif words and words[0].endswith("difffast"):
            check_command(words[1:])
    for script in re.findall(r"`(?:python )?((?:bench|tests|examples)/[a-z0-9_/]+\.(?:py|sh))", page.read_text()):
        assert (ROOT / script).exists(), script


def check_command(words):
    """Parse a command line of ``difffast`` as the command would."""
    arguments = cli._parser().parse_args(words)
    if hasattr(arguments, "forwarded"):
        import run

        run.make_parser().parse_args(arguments.forwarded)


@pytest.fixture
def names(pipe, tmp_path, monkeypatch):
    """What the pages' snippets may take for granted; afterwards nothing that they did is left."""
    monkeypatch.chdir(tmp_path)
    # Its profile alone would take half a minute.
    monkeypatch.setattr(sys.modules["difffast.tune"].PlanSearch, "find", lambda self, show: [])
    kinds, stages = list(LAYERS), [copy.deepcopy(pipe) for _ in range(3)]
    names = {"pipe": pipe, "difffast": difffast, **{f"stage_{i}": stage for i, stage in enumerate(stages, 1)}}
    rows = {"q": 64, "k": 77, "v": 77, "text_k": 9, "text_v": 9}
    names.update({name: torch.randn(2, 4, n, 32) for name, n in rows.items()})
    names.update(x=torch.randn(2, 9, 5), weight=torch.randn(7, 5), bias=torch.randn(7))
    yield names
    difffast.unpatch([pipe, *stages])
    LAYERS[:] = kinds


def run_all(codes, names):
    with warnings.catch_warnings():
        # ToMe's step sizes are for trained models; this one is random.
        warnings.filterwarnings("ignore", "difffast: semantic binding diverged")
        for code in codes:
            exec(code, names)


#: Page -> what its snippets leave behind: name -> whether it is right.
RESULTS = {
    "steering.md": {
        "picture": lambda picture: picture.shape[0] == 1,
        "cat": lambda cat: cat.shape[0] == 1 and cat.ndim == 3,
        "cats": lambda cats: cats.ndim == 2,
        "wide": lambda wide: wide.size == (64, 32),
    },
    "operators.md": {"loss": lambda loss: loss.shape == (2,)},
    "presets.md": {"kept": lambda kept: difffast.Plan.from_json(kept).total == 50},
}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "README.md" and blocks(page, "python")], ids=by_name
)
def test_the_snippets_run(page, names):
    if page.name == "editing.md":  # a local blend needs a level of a quarter of the latents' size
        names["pipe"] = difffast.models.tiny_pipeline("sd", channels=(32, 32, 64), sample_size=8)
        names["pipe"].set_progress_bar_config(disable=True)
    run_all(blocks(page, "python"), names)
    for name, is_right in RESULTS.get(page.name, {}).items():
        assert is_right(names[name]), name


def test_the_readme_runs_as_it_stands(names):
    first, *others = blocks(ROOT / "README.md", "python")
    alone = {}
    exec(first, alone)
    assert alone["image"].size == (64, 64)
    assert alone["report"].last_run.total == 50
    run_all(others, names)
    assert names["tuning"].rows


def test_contributing_maps_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = Path(difffast.__file__).parent
    for folder in (each.parent.name for each in package.glob("*/__init__.py")):
        assert f"`{folder}/`" in text, folder
