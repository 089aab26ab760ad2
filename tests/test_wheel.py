"""The wheel: what it holds, with and without a compiler, and that it works from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import difffast

ROOT = Path(__file__).resolve().parents[1]
CODE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc", "triton_kernels", "difffast")
BUILT = shutil.ignore_patterns("*.so", "__pycache__")
#: The command that README, build log and ``difffast info`` give.
COMMAND = "pip install -v --no-build-isolation ."

#: Imports every module, then makes a picture with a patched pipeline; {prefix} and {checkout} are filled in.
WORKS = """
import importlib, pathlib, pkgutil, sys, warnings
import difffast
warnings.simplefilter("default")  # what others warn of later is their own

prefix, checkout = pathlib.Path({prefix!r}), pathlib.Path({checkout!r})
for module in pkgutil.walk_packages(difffast.__path__, "difffast."):
    importlib.import_module(module.name)
pipe = difffast.models.embedded_pipeline()
pipe.set_progress_bar_config(disable=True)
report = difffast.patch(pipe, "turbo")
assert pipe("a red circle", num_inference_steps=8, output_type="np").images.std() > 0.05
difffast.unpatch(pipe)

files = [pathlib.Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
assert pathlib.Path(difffast.__file__) == prefix / "difffast" / "__init__.py"
assert sum(prefix in file.parents for file in files) > 40
folders = [checkout / name for name in ("difffast", "triton_kernels", "bench", "tests")]
assert not [file for file in files if any(folder in file.parents for folder in folders)]
print(report)
"""


@pytest.fixture
def source(tmp_path):
    """A copy of what a wheel is built from, with a module in it that an earlier build left behind."""
    folder = tmp_path / "source"
    stale = folder / "build" / "lib" / "difffast" / "moved_away.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    for name in CODE:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / name, **({"ignore": BUILT} if path.is_dir() else {}))
    return folder


def pip(*arguments, cwd, **variables):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)


def build(source, **variables):
    """Build the wheel without isolation; (the log, the wheel)."""
    built = pip("wheel", "--no-build-isolation", "--no-deps", "-w", source.parent, ".", cwd=source, **variables)
    log = built.stdout + built.stderr
    assert built.returncode == 0, log
    (wheel,) = source.parent.glob("*.whl")
    return log, wheel


def files_of_the_tree():
    """What a wheel without the extension must hold, by the names that it must have there."""
    found = set()
    for folder, name in (("difffast", "difffast"), ("triton_kernels", "difffast/triton_kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                found.add(f"{name}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


@pytest.mark.slow
def test_the_wheel_of_an_isolated_build_works_from_an_empty_folder(source, tmp_path):
    """``pip install .`` builds where there is no torch; here a module that cannot be imported stands for that."""
    hidden, prefix, empty = tmp_path / "hidden", tmp_path / "prefix", tmp_path / "empty"
    for folder in (hidden, empty):
        folder.mkdir()
    (hidden / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    log, wheel = build(source, PYTHONPATH=str(hidden))
    assert "building without the C++ extension: torch cannot be imported (No module named 'torch')" in log
    assert log.count(COMMAND) == 1  # without -v, beside which a reader would not see it
    assert len(log.splitlines()) < 30, log
    assert wheel.name == f"difffast-{difffast.__version__}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files_of_the_tree()

    installed = pip("install", "--no-deps", "--no-index", "--target", prefix, wheel, cwd=empty)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    # -S: without the site module, no .pth file puts the editable installation's finder in.
    path = os.pathsep.join(map(str, (prefix, sysconfig.get_path("purelib"))))
    # One thread: others run beside this test, and threads that wait for a core would spin.
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "300", "OMP_NUM_THREADS": "1"}

    def python(*arguments):
        command = [sys.executable, "-S", *map(str, arguments)]
        ran = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return " ".join(ran.stdout.split())

    program = prefix / "bin" / "difffast"
    report = python("-W", "error", "-c", WORKS.format(prefix=str(prefix), checkout=str(ROOT)))
    assert f"operators run on the PyTorch reference: {difffast.ops._installed.NOT_BUILT}" in report
    assert COMMAND in python(program, "info")
    assert "demo.json" in python(program, "demo", "--steps", "8", "--seeds", "1", "--preset", "turbo", "--out", empty)
    assert (empty / "grid.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["found", "missing"])
def test_a_wheel_with_and_without_a_compiler(source, compiler):
    variables = {"CXX": "no-such-compiler"} if compiler == "missing" else {}
    log, wheel = build(source, **variables)
    names = zipfile.ZipFile(wheel).namelist()
    assert files_of_the_tree() <= set(names)
    assert any(name.startswith("difffast/_C") for name in names) == (compiler == "found")
    if compiler == "found":
        assert "abi3" in wheel.name
    else:
        assert "no C++ compiler: 'no-such-compiler' is not on PATH" in log
        strict = pip("wheel", "--no-build-isolation", "--no-deps", ".", cwd=source, **variables, DIFFFAST_BUILD_CPP="1")
        assert strict.returncode != 0
