"""Measures how the source is laid out, one line a figure: what to compare before and after a change of structure.

A room is a file or folder at a package's root. Floors are the longest chain of imports among rooms. Imports for the
checker of types alone are not counted.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("adapters_store", "server", "trainer", "clients")
PACKAGES = ("settings", "adapters", "engine", "server", "trainer", "client", "load", "cli")
PORTS = "import manyhats.server.grpc.port, manyhats.server.http.port"
_LONG_FUNCTION = 40
_MANY_ARGUMENTS = 6
_A_LINEAR = "q_proj"
# What files name: a family's checkpoints, and formats of adapters.
_NAMES_OF_FILES = (".families.", ".formats.")

Graph = Mapping[str, set[str]]


def read_sources() -> dict[str, ast.Module]:
    """Module name → its tree, of all packages but the generated one."""
    trees = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            trees[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return trees


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but what is for the checker of types alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from run_time_nodes(node)


def imports_of(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module → those of ``trees`` that it imports."""
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        named: set[str] = set()
        for node in run_time_nodes(tree):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= full & trees.keys() or {node.module}
        found[name] = (named & trees.keys()) - {name}
    return found


def rooms_of(imports: Graph, package: str) -> dict[str, set[str]]:
    """Room → other rooms of the package that it imports."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in imports.items():
        room = _room(module, package)
        if room:
            rooms[room] |= {found for each in others if (found := _room(each, package))} - {room}
    return dict(rooms)


def num_floors(rooms: Graph) -> int:
    """Rooms in the longest chain of imports; 0 where there is a circle."""
    depths: dict[str, int] = {}
    try:
        for room in TopologicalSorter(rooms).static_order():
            depths[room] = 1 + max((depths[below] for below in rooms.get(room, ())), default=0)
    except CycleError:
        return 0
    return max(depths.values())


def reached(imports: Graph, start: str) -> set[str]:
    """Modules that one imports, at any distance."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        new = imports[pending.pop()] - seen
        seen |= new
        pending += new
    return seen


def import_seconds(statement: str) -> float:
    """How long a process takes for it, the best of three, less what an empty one takes."""

    def best(code: str) -> float:
        times = []
        for _ in range(3):
            begin_s = time.monotonic()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.monotonic() - begin_s)
        return min(times)

    return best(statement) - best("pass")


def _room(module: str, package: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["manyhats", package] and len(parts) > 2 else None


def _functions(trees: Mapping[str, ast.Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement to the last, the docstring not counted."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _num_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return len(function.args.args) + len(function.args.kwonlyargs) - 1


def names_a_linear(tree: ast.Module) -> bool:
    """Whether code, and not just what is written about it, names a linear of the attention."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return any(
        (isinstance(node, ast.keyword) and node.arg == _A_LINEAR)
        or (isinstance(node, ast.Constant) and node.value == _A_LINEAR and id(node) not in docs)
        for node in ast.walk(tree)
    )


def main() -> None:
    """Print the figures."""
    trees = read_sources()
    imports = imports_of(trees)
    for package in PACKAGES:
        rooms = rooms_of(imports, package)
        floors = num_floors(rooms)
        print(f"{package}: {len(rooms)} rooms, {f'{floors} floors' if floors else 'a circle among them'}")
    backends = [name for name in trees if name.startswith("manyhats.engine.backends")]
    knowing = [name for name in backends if any("schedul" in each for each in reached(imports, name))]
    print(
        f"modules of backends that import the scheduler, at any distance: {len(knowing)} of {len(backends)}"
    )
    importers = [sum(name in others for others in imports.values()) for name in trees]
    print(f"modules imported by exactly one other: {importers.count(1) / len(importers):.0%}")
    functions = list(_functions(trees))
    print(
        f"functions over {_LONG_FUNCTION} lines: {sum(_body_lines(each) > _LONG_FUNCTION for each in functions)}"
    )
    wide = sum(each.name == "__init__" and _num_arguments(each) > _MANY_ARGUMENTS for each in functions)
    print(f"__init__ with over {_MANY_ARGUMENTS} arguments: {wide}")
    naming = [name for name, tree in trees.items() if names_a_linear(tree)]
    others = [name for name in naming if not any(part in name for part in _NAMES_OF_FILES)]
    print(f"modules that name a layer's linears, beside what reads files: {len(others)}")
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    print(f"lines of source: {sum(len(path.read_text().splitlines()) for path in paths)}")
    print(f"import of the server's ports: {import_seconds(PORTS):.1f} s")


if __name__ == "__main__":
    main()
