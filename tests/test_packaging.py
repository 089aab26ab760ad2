"""The installation: what is pinned and declared, and that nothing needs a compiler or a GPU to import."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Packages whose name differs from that of their module.
PACKAGE_OF = {"PIL": "pillow"}
#: Older torches than the pinned one, with the triton that each pins, are proved by hand (pyproject.toml).
BY_HAND = ("torch", "triton")


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
    wanted = {name: version for name, version in lower_bounds().items() if name not in BY_HAND}
    assert [line for line in lines if not line.startswith(BY_HAND)] == [f"{n}=={v}" for n, v in wanted.items()]
    newest = [line for line in pins("constraints.txt") if line.startswith(BY_HAND)]
    assert [line for line in lines if line.startswith(BY_HAND)] == newest


def declared(section):
    """The packages that a list of pyproject.toml names."""
    text = re.search(rf"^{section} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    return set(re.findall(r'"([a-z0-9-]+)[>=]', text))


def imported_modules():
    """Top-level names of what the library imports when it runs, anywhere: module -> the files that do."""
    found = {}
    for path in (each for folder in ("difffast", "triton_kernels") for each in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_every_module_that_is_imported_is_declared():
    others = {
        PACKAGE_OF.get(name, name): files
        for name, files in imported_modules().items()
        if name not in sys.stdlib_module_names and name != "difffast"
    }
    undeclared = {name: files for name, files in others.items() if name not in declared("dependencies")}
    assert undeclared.keys() == {"matplotlib", "openvino", "peft"}, undeclared
    assert {"torch", "tqdm", "triton", "pillow"} <= others.keys()
    assert declared("plots") == {"matplotlib"}
    assert declared("openvino") == {"openvino"}
    assert declared("lora") == {"peft"}
    assert "matplotlib" in declared("bench")


@pytest.mark.parametrize("owner", ["plan", "tuning"])
def test_without_matplotlib_a_plot_names_the_command(owner, tmp_path, monkeypatch):
    from difffast import EncoderPropagation
    from difffast.tune import Tuning

    drawn = EncoderPropagation().plan(20)
    if owner == "tuning":
        drawn = object.__new__(Tuning)  # the refusal comes before anything of it is read
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^drawing needs matplotlib: `pip install matplotlib`"):
        drawn.plot(tmp_path / "plan.png")


def test_the_supported_range_is_declared():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project
    assert f"torch {lower_bounds()['torch']}" in project, "a comment says what proved the oldest torch"
    assert "torch" not in re.search(r"^requires = (.*)$", project, re.M)[1]


def test_triton_kernels_is_ours_only_below_difffast():
    import difffast.triton_kernels

    assert difffast.triton_kernels.__name__ == "difffast.triton_kernels"
    result = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "import difffast.triton_kernels" in result.stderr


def test_import_needs_no_compiler_no_gpu_and_no_triton():
    code = "import sys; sys.modules.update(triton=None, matplotlib=None); import difffast; print(difffast.__all__)"
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "patch" in result.stdout


def test_the_extension_is_refused_where_it_would_crash(monkeypatch):
    from difffast.ops import _installed

    assert f"STABLE_ABI = {_installed.STABLE_ABI}\n" in (ROOT / "setup.py").read_text()
    monkeypatch.setattr(_installed.torch, "__version__", "2.9.1+cu128")
    library, reason = _installed._load_extension()
    assert library is None
    assert reason == "difffast._C needs torch >= 2.10, whose ABI is stable, and torch is 2.9.1+cu128"


def test_tests_run_where_there_is_no_triton():
    """On macOS, say: a fixture of every test asks for its interpreter."""
    helpers = Path(__file__).parent / "helpers"
    code = f"import sys; sys.modules['triton'] = None; sys.path.append({str(helpers)!r})\n"
    code += "from triton_interpreter import as_hardware\nwith as_hardware(): print('ran')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "ran", done.stderr
