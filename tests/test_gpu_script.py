"""bench/gpu.sh, rehearsed with stand-ins for Python and compute-sanitizer: what is done, left behind and returned."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "sanitizer", "prove", "images")

#: A stand-in for Python: it says what it was asked, and does what the variable of a program's name says.
PYTHON = """#!/bin/bash
echo "$*" >> "$ASKED"
case "$*" in
  *get_device_name*) echo 'Stand-in "GPU" 3000';;
  *"-m pytest "*) eval "${FAKE_TESTS:-}"; echo "3 passed";;
  *gpu_sanitizer_cases.py*) eval "${FAKE_SANITIZER:-}"; echo "24 cases, 0 failed";;
  *"cli prove "*) eval "${FAKE_PROVE:-}"
    while [ $# -gt 0 ]; do [ "$1" = --report ] && echo '{"proved": 7}' > "$2"; shift; done
    echo "7 keys proved";;
  *gpu_images.py*) eval "${FAKE_IMAGES:-}"
    while [ $# -gt 0 ]; do [ "$1" = --out ] && echo '{"rows": []}' > "$2/images.json"; shift; done
    echo "sd15 20 steps stock";;
  *) exit 0;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def rehearse(tmp_path):
    """Run the script in a copy of its folder; returns its exit status, its seconds, OUT and what Python was asked."""
    (tmp_path / "tree" / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "tree" / "bench" / "gpu.sh")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python": PYTHON, "compute-sanitizer": '#!/bin/bash\n"${@:7}"\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments, **variables):
        asked, out = tmp_path / "asked.txt", tmp_path / "out"
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHON": str(tools / "python"), "ASKED": str(asked), **variables}
        start = time.monotonic()
        script = tmp_path / "tree" / "bench" / "gpu.sh"
        code = subprocess.run(["bash", str(script), str(out), *arguments], env=environment, capture_output=True)
        return code.returncode, time.monotonic() - start, out, asked.read_text()

    return run


def load(out):
    return {name: json.loads((out / f"part-{name}.json").read_text()) for name in PARTS}


def test_all_parts_run_and_each_leaves_its_json(rehearse):
    status, _, out, asked = rehearse()
    assert status == 0
    for name, found in load(out).items():
        assert (found["part"], found["status"], found["card"]) == (name, 0, 'Stand-in "GPU" 3000')
    assert json.loads((out / "prove-sdxl.json").read_text()) == {"proved": 7}
    assert json.loads((out / "images.json").read_text()) == {"rows": []}
    parts = load(out)
    assert parts["sanitizer"]["last"]["sanitizer-memcheck-cuda.txt"] == "24 cases, 0 failed"
    assert parts["tests"]["last"]["tests-pipelines.txt"] == "3 passed"
    order = [
        asked.index(word) for word in ("pip install", "-m pytest", "gpu_sanitizer_cases", "cli prove", "gpu_images.py")
    ]
    assert order == sorted(order)
    assert asked.count("gpu_sanitizer_cases") == 8, "four tools, two backends"
    assert "--device cuda --dtype float16" in asked


@pytest.mark.parametrize("part", ["tests", "sanitizer", "prove", "images"])
def test_a_part_that_fails_stops_no_other_and_is_the_exit_status(rehearse, part):
    status, _, out, _ = rehearse(**{f"FAKE_{part.upper()}": "exit 4"})
    assert status == 1
    assert {name for name, found in load(out).items() if found["status"]} == {part}
    assert f"FAILED: {part}" in (out / "times.txt").read_text()


def test_tests_that_a_backend_does_not_have_are_no_failure(rehearse):
    assert rehearse("60", "tests", FAKE_TESTS="exit 5")[0] == 0


def test_the_time_limit_ends_what_hangs(rehearse):
    """A proof that also ignores the first signal; what is after it has no time left, and says so."""
    status, seconds, out, _ = rehearse("4", "prove", "images", GPU_MODELS="sd15", FAKE_PROVE="trap '' TERM; sleep 600")
    assert status == 1
    assert seconds < 25
    assert json.loads((out / "part-prove.json").read_text())["status"] == 1
    assert json.loads((out / "part-images.json").read_text())["part"] == "images"


def test_named_parts_alone_run(rehearse):
    status, _, out, asked = rehearse("60", "prove", GPU_MODELS="sd15", GPU_DEVICE="cpu")
    assert status == 0
    assert [each.name for each in out.glob("part-*")] == ["part-prove.json"]
    assert "--device cpu --dtype float32" in asked
    assert "-m pytest" not in asked
