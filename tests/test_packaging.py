"""The installation: what is pinned, what a wheel holds, and that nothing needs a compiler or a GPU to import."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "triton_kernels", "difffast")


def pins(constraints):
    return [line for line in (ROOT / constraints).read_text().splitlines() if line and line[0] != "#"]


def lower_bounds():
    """What pyproject.toml asks for, of the build system, the library and its extras: name -> oldest version."""
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    return dict(re.findall(r'"([a-z0-9-]+)>=([0-9.]+)[;"]', project))


def test_every_dependency_is_pinned_exactly():
    lines = pins("constraints.txt")
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+(; python_version (<|>=) \"3.11\")?", line) for line in lines)
    assert {line.split("==")[0] for line in lines} == lower_bounds().keys()
    assert "torch==2.13.0" in lines


def test_make_test_oldest_installs_the_declared_lower_bounds():
    lines = pins("constraints-oldest.txt")
    assert lines == [f"{name}=={version}" for name, version in lower_bounds().items()]


def test_the_supported_range_is_declared():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project
    assert "torch" not in re.search(r"^requires = (.*)$", project, re.M)[1]


def test_triton_kernels_is_ours_only_below_difffast():
    import difffast.triton_kernels

    assert difffast.triton_kernels.__name__ == "difffast.triton_kernels"
    result = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "import difffast.triton_kernels" in result.stderr


def test_import_needs_no_compiler_no_gpu_and_no_triton():
    code = "import sys; sys.modules['triton'] = None; import difffast; print(difffast.__all__)"
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "patch" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["found", "missing"])
def test_a_wheel_with_and_without_a_compiler(tmp_path, compiler):
    source = tmp_path / "source"
    source.mkdir()
    for name in CODE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    environment = {**os.environ, **({"CXX": "no-such-compiler"} if compiler == "missing" else {})}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.startswith("triton_kernels") for name in names)
    assert {"difffast/triton_kernels/__init__.py", "difffast/py.typed", "difffast/models/tiny.py"} <= set(names)
    assert any(name.startswith("difffast/_C") for name in names) == (compiler == "found")
    if compiler == "found":
        assert "abi3" in wheel.name
    else:
        assert "no C++ compiler: 'no-such-compiler' is not on PATH" in result.stdout + result.stderr
        environment["DIFFFAST_BUILD_CPP"] = "1"
        strict = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        assert strict.returncode != 0
