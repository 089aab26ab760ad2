"""The house: no circle, no arrow upwards, nothing too large to read; see CONTRIBUTING.md."""

from __future__ import annotations

import subprocess
from pathlib import Path

import house
import pytest

ARROWS = house.arrows()
ROOT = Path(__file__).resolve().parents[1]
#: What lies at the top, but for dotfiles.
TOP = [
    "bench",
    "csrc",
    "difffast",
    "docs",
    "examples",
    "tests",
    "triton_kernels",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
]
PACKAGE = {name: path for name, path in house.modules().items() if house.room(name) != "triton_kernels"}


def test_every_room_has_a_floor():
    known = {room for rooms in house.FLOORS for room in rooms}
    assert {house.room(name) for name in house.modules()} <= known, "a new folder needs a place in tests/house.py"


def test_there_is_no_circle():
    assert house.circles(ARROWS) == []


def test_arrows_point_downwards():
    upwards = [
        f"{name} -> {target}"
        for name, targets in ARROWS.items()
        for target in targets
        if house.room(name) != house.room(target) and house.floor(name) <= house.floor(target)
    ]
    assert upwards == []


def test_nothing_else_lies_at_the_top():
    """What an experiment leaves behind was committed once, with all other changes."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git: {listed.stderr.strip()}")
    found = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == set(TOP)


def test_patch_knows_no_method():
    rooms = {house.room(target) for target in ARROWS["difffast.patch"]}
    assert not rooms & {"steering", "erase", "distributed"}
    assert len(PACKAGE["difffast.patch"].read_text().splitlines()) <= 150


def test_plans_and_support_know_nothing_of_torch():
    for name, path in PACKAGE.items():
        if house.room(name) in ("plan", "support", "presets"):
            assert "import torch" not in path.read_text(), name


@pytest.mark.parametrize("name", PACKAGE)
def test_files_and_functions_are_short_enough_to_read(name):
    path = PACKAGE[name]
    assert len(path.read_text().splitlines()) <= 400
    for function, lines, parameters in house.functions(path):
        assert lines <= 60, f"{function} has {lines} lines"
        assert parameters <= 8 or house.room(name) == "ops", f"{function} has {parameters} parameters"


def test_no_other_python_file_is_too_long_to_read():
    files = [
        path for place in ("bench", "examples", "tests", "triton_kernels") for path in (ROOT / place).rglob("*.py")
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 200
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert house.circles(graph) == [["b", "c"]]
