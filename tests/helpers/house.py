"""The structure of the package as its imports draw it; annotations and late imports count."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: From the bottom to the top; rooms on one floor do not know each other.  A room is a folder, or a file of the top one.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("files",),
    ("triton_kernels", "renamed", "later", "plots", "support", "words"),
    ("ops", "plan", "models"),
    ("surgery", "presets"),
    ("layers",),
    ("unet",),
    ("engines", "proofs"),
    ("sampling", "target"),
    ("distributed",),
    ("steering", "erase", "options"),
    ("report", "sites"),
    ("patch",),
    ("collect", "editing", "tuning"),
    ("tune",),
    ("difffast",),
    ("tools",),
)


def modules() -> dict[str, Path]:
    """Every module of the installed package, by name."""
    found = {}
    for folder, name in ((ROOT / "difffast", "difffast"), (ROOT / "triton_kernels", "difffast.triton_kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def arrows() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in it and for whatever purpose."""
    known = modules()
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        for target in _imports(name, path, known):
            if target != name:
                found[name].add(target)
    return found


def _imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                if target in known:
                    yield target


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def floor(module: str) -> int:
    """The floor that a module is on, 0 the lowest."""
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or on a detour (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    waiting: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        waiting.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in waiting:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = waiting[waiting.index(node) :]
            del waiting[waiting.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in list(graph):
        if node not in index:
            visit(node)
    return found


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Of every function in a file: its name, its lines without the docstring, and how many parameters it has."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start, first = node.lineno, node.body[0]
            if ast.get_docstring(node) is not None:
                start += first.end_lineno - first.lineno + 1
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            yield node.name, node.end_lineno - start + 1, sum(each.arg not in ("self", "cls") for each in every)
