"""Imports between the packages point one way only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "v1": ROOT / "proto/manyhats/v1",
    "adapters": ROOT / "adapters_store/manyhats/adapters",
    "engine": ROOT / "server/manyhats/engine",
    "server": ROOT / "server/manyhats/server",
    "trainer": ROOT / "trainer/manyhats/trainer",
    "client": ROOT / "clients/manyhats/client",
    "cli": ROOT / "clients/manyhats/cli",
}
ALLOWED = {
    "v1": set(),
    "adapters": set(),
    "engine": {"adapters"},
    "server": {"v1", "engine", "adapters"},
    "trainer": {"engine", "adapters", "client"},
    "client": {"v1"},
    "cli": set(PACKAGES) - {"cli"},
}
# What a package must not know, wherever the import stands.
FORBIDDEN = {
    "adapters": {"grpc", "prometheus_client"},
    "engine": {"grpc", "prometheus_client", "google"},
    "client": {"torch", "numpy", "transformers", "typer", "rich"},
}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(package: str) -> list[Path]:
    files = [path for path in PACKAGES[package].rglob("*.py") if "_pb2" not in path.name]
    assert files or package == "v1", f"{PACKAGES[package]} holds no source"
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_point_one_way(package: str) -> None:
    for path in sources(package):
        parts = (name.split(".") for name in imported_modules(path) if name.startswith("manyhats."))
        others = {name[1] for name in parts} - {package}
        assert others <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {others - ALLOWED[package]}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_does_not_import_what_it_must_not_know(package: str) -> None:
    for path in sources(package):
        top = {name.split(".")[0] for name in imported_modules(path)}
        assert not top & FORBIDDEN[package], f"{path.relative_to(ROOT)} imports {top & FORBIDDEN[package]}"


def test_the_namespace_package_has_no_init_file() -> None:
    for path in PACKAGES.values():
        assert not (path.parent / "__init__.py").exists()
