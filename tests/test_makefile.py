"""``make run`` installs what running needs and no more; ``make test`` adds the developers' tools."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# Imported only where they are asked for, as object stores and databases, which have extras of their own, and Triton,
# which builds of torch for CUDA bring; or never.
OPTIONAL = {"opentelemetry", "s3fs", "gcsfs", "psycopg", "ray", "tensorboard", "triton", "_typeshed"}
DEVELOPERS_TOOLS = {
    "mypy",
    "ruff",
    "pytest",
    "hypothesis",
    "moto",
    "atheris",
    "peft",
    "buf-bin",
    "mypy-protobuf",
}


def planned(target: str) -> str:
    """What ``make`` would run on a fresh machine."""
    result = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "VENV=no/such/venv", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("run", ["train"]),
        ("run-encoder", ["train"]),
        ("setup", ["train", "dev"]),
        ("test", ["train", "dev"]),
        ("test-slow", ["train", "dev"]),
        ("test-torch", ["train", "dev"]),
        ("test-adapterhub", ["train", "dev"]),
        ("check", ["train", "dev"]),
        ("bench", ["train", "dev"]),
        ("profile", ["train", "dev"]),
        ("bench-peers", ["train", "dev"]),
        ("examples", ["train", "dev"]),
        ("fuzz", ["train", "dev"]),
        ("conformance", ["train", "dev"]),
        ("soak", ["train", "dev"]),
        ("churn", ["train", "dev"]),
        ("simulate", ["train", "dev"]),
        ("test-floors", ["train", "dev"]),
        ("test-deploy", ["train", "dev", "docs"]),
    ],
)
def test_a_fresh_machine_gets_what_a_target_needs_under_constraints(target: str, extras: list[str]) -> None:
    installs = [
        line for line in planned(target).splitlines() if "pip install" in line and "upgrade pip" not in line
    ]
    assert re.findall(r"--editable '\.\[([a-z]+)\]'", "\n".join(installs)) == extras
    assert installs[0].endswith(" torch")
    assert all("-c constraints.txt" in line for line in installs)


def test_the_site_is_built_without_torch() -> None:
    installs = [line for line in planned("docs").splitlines() if "pip install" in line]
    assert re.findall(r"--editable '\.\[([a-z]+)\]'", "\n".join(installs)) == ["docs"]
    assert all("-c constraints.txt" in line for line in installs)
    assert not direct_requirements("docs") & {"torch", "numpy", "transformers", "starlette"}


def direct_requirements(extra: str) -> set[str]:
    """The requirements of an extra by name, without theirs: they may not be installed."""
    found = map(Requirement, metadata.requires("manyhats") or ())
    return {
        canonicalize_name(each.name)
        for each in found
        if each.marker is not None and each.marker.evaluate({"extra": extra})
    }


def requirements_of(*extras: str) -> set[str]:
    """The project's requirements with these extras, and theirs, by name."""
    found: set[str] = set()
    open_names = [("manyhats", extra) for extra in ("", *extras)]
    while open_names:
        name, extra = open_names.pop()
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(requirement.name)
            if key not in found or key == "manyhats":
                found.add(key)
                open_names += [(key, each) for each in ("", *requirement.extras)]
    return found


def test_running_and_training_import_nothing_that_make_run_does_not_install() -> None:
    installed = requirements_of("train")
    distributions = metadata.packages_distributions()
    folders = [ROOT / folder / "manyhats" for folder in ("adapters_store", "server", "trainer", "clients")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += [ROOT / "examples" / name for name in ("serve.py", "mixed_call.py")]
    files += [ROOT / "examples/encoder" / name for name in ("serve.py", "mixed_call.py")]
    missing = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in third_party_imports(path) - OPTIONAL
        if not {canonicalize_name(each) for each in distributions.get(name, [])} & installed
    }
    assert missing == set()


def third_party_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"manyhats", "examples", "__future__"}


def test_make_run_installs_no_developers_tool() -> None:
    assert not requirements_of("train") & DEVELOPERS_TOOLS
    assert requirements_of("dev") >= DEVELOPERS_TOOLS


def test_what_python_compiles_is_kept_whatever_the_environment_says() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "--eval", "show: ; @env", "show"],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.partition("=")[0] for line in shown.stdout.splitlines()}
    assert "PYTHONUNBUFFERED" in names
    assert "PYTHONDONTWRITEBYTECODE" not in names


def test_make_run_installs_what_transformers_reads_the_default_model_with() -> None:
    assert requirements_of("train") >= {"accelerate", "gguf"}
