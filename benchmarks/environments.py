"""Environments of others' programs: made once, with the versions that are written down, apart from the project's."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_STAMP = "installed"


class UnavailableError(Exception):
    """Packages cannot be fetched or built, or a program that they need is missing."""


def python_of(directory: Path, requirements: Path) -> Path:
    """The interpreter of an environment with the packages of a requirements file.

    If torch is among them, it is installed first and alone, with pip's options of the variable TORCH_ARGS: such as an
    index of CPU builds.

    Args:
        directory: where the environment is, or is made.
        requirements: exact versions of all packages, those included that others depend on: no other one is installed.

    Raises:
        UnavailableError: they cannot be installed.
    """
    name, python = directory.name, directory / "bin" / "python"
    text = requirements.read_text()

    def make() -> None:
        run_step(name, [sys.executable, "-m", "venv", "--clear", str(directory)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
        torch = [line for line in text.splitlines() if line.startswith("torch==")]
        if torch:
            run_step(name, [*pip, *shlex.split(os.environ.get("TORCH_ARGS", "")), *torch])
        run_step(name, [*pip, "--no-deps", "-r", str(requirements)])

    make_once(directory, text, make)
    return python


def make_once(directory: Path, recipe: str, make: Callable[[], None]) -> None:
    """Calls ``make`` unless the directory was made to the end by this very recipe."""
    stamp, digest = directory / _STAMP, hashlib.sha256(recipe.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        make()
        stamp.write_text(digest)


def need_programs(name: str, *programs: str) -> None:
    """Checks that programs of the system are there.

    Raises:
        UnavailableError: one is not.
    """
    for program in programs:
        if shutil.which(program) is None:
            raise UnavailableError(f"{name}: {program} is not installed")


def run_step(name: str, command: Sequence[str]) -> None:
    """One command of making the environment ``name``.

    Raises:
        UnavailableError: it failed; the text ends with its last lines.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip().splitlines()[-3:]
        raise UnavailableError(f"{name}: its packages cannot be installed: {' / '.join(said)}")
