"""Which way imports point: operators know their Triton kernels, the kernels know no operator."""

import ast
from pathlib import Path

import pytest

from difffast import ops

OPERATORS = Path(ops.__file__).parent
KERNELS = Path(__file__).parents[2] / "triton_kernels"


def imports(path, package):
    """Absolute names of what a file imports, with whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(each) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 3 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in late) for name in names)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_nothing_of_difffast_but_kernels(path):
    ours = [name for name, _ in imports(path, "difffast.triton_kernels") if name.startswith("difffast")]
    assert [name for name in ours if not name.startswith("difffast.triton_kernels.")] == []


@pytest.mark.parametrize("path", sorted(OPERATORS.glob("*.py")), ids=lambda path: path.stem)
def test_operators_import_operators_and_when_called_kernels(path):
    for name, at_once in imports(path, "difffast.ops"):
        if name.startswith("difffast"):
            kernels = name.startswith("difffast.triton_kernels.")
            assert kernels or name.startswith("difffast.ops."), name
            assert not (kernels and at_once), f"{name} would make import difffast import Triton"


def test_what_counts_as_an_import(tmp_path):
    path = tmp_path / "example.py"
    path.write_text("import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from difffast.ops import g\n")
    found = list(imports(path, "difffast.ops"))
    assert found == [
        ("a.b", True), ("difffast.ops.c", True), ("difffast.d.e", True), ("difffast.ops.g", False)
    ]  # fmt: skip
