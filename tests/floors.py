"""Runs tests at the lowest versions that pyproject.toml allows.

``make test-floors``, or ``python -m floors`` in ``tests`` with pytest's arguments. uv finds the lowest versions that go
together; those that differ from the developers' lie in ``.deploy/floors``, before the developers' packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environments import make_once, python_of, run_step  # noqa: E402

HOME = ROOT / ".deploy"
TOOLS = ROOT / "tests/deploy/packaging.txt"
# S3 and GCS are left out: their libraries' lowest versions do not go with the one that tests take the other side from.
EXTRAS = ("server", "train", "frame", "polars", "otel", "postgres")
TESTS = (
    "tests/client",
    "tests/cli",
    "tests/load",
    "tests/adapters",
    "tests/settings",
    "tests/server",
    "tests/trainer",
)
# What developers' programs make and check, which lie beside another interpreter.
OF_PROGRAMS = (
    "test_generated_code_is_what_the_proto_files_give",
    "test_check_of_generated_code_finds_a_difference",
    "test_proto_files_pass_the_linter",
)
# What torch needs on a GPU; the developers' torch may be without.
FOR_GPUS = ("cuda-", "nvidia-", "triton")


def asked_for() -> dict[str, Version]:
    """The lower bounds that the project says, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    found = {}
    for requirement in map(Requirement, lines):
        bounds = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        if requirement.name != "manyhats":
            found[canonicalize_name(requirement.name)] = Version(*bounds)
    return found


def lowest() -> dict[str, Version]:
    """The lowest versions of what is asked for that go together, and usual ones of what those need where they can."""
    asked = asked_for()
    usual = (Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    file = HOME / "floors.txt"
    uv = python_of(HOME / "packaging", TOOLS).with_name("uv")
    # uv prefers what it finds in the file.
    file.write_text("".join(f"{each}\n" for each in usual if canonicalize_name(each.name) not in asked))
    command = [
        str(uv),
        "pip",
        "compile",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--resolution",
        "lowest-direct",
    ]
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    run_step("floors", [*command, *extras, "--output-file", str(file), str(ROOT / "pyproject.toml")])
    pins = map(Requirement, file.read_text().splitlines())
    return {each.name: Version(next(iter(each.specifier)).version) for each in pins}


def environment(pins: dict[str, Version]) -> Path:
    """The interpreter of the environment with these versions where the developers' has others."""
    wanted = [f"{name}=={version}" for name, version in pins.items() if version.public != here(name)]
    wanted = [line for line in wanted if not line.startswith(FOR_GPUS)]
    directory = HOME / "floors"
    python = directory / "bin" / "python"

    def make() -> None:
        run_step("floors", [sys.executable, "-m", "venv", "--clear", str(directory)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        run_step("floors", [*pip, "--only-binary", ":all:", *wanted])
        run_step("floors", [*pip, "--editable", str(ROOT)])
        ours, developers = (
            sysconfig.get_path("purelib", vars={"base": str(directory)}),
            sysconfig.get_path("purelib"),
        )
        (Path(ours) / "developers.pth").write_text(f"import site; site.addsitedir({developers!r})\n")

    make_once(directory, "\n".join(wanted), make)
    return python


def here(name: str) -> str:
    """The developers' version, without what it was built for; empty if they have none."""
    try:
        return Version(metadata.version(name)).public
    except metadata.PackageNotFoundError:
        return ""


def main(arguments: Sequence[str]) -> int:
    """Say which bounds are lower than what goes together, then run pytest; returns its exit code."""
    pins, asked = lowest(), asked_for()
    wrong = {name: (str(bound), str(pins[name])) for name, bound in asked.items() if pins[name] != bound}
    for name, (bound, version) in wrong.items():
        print(f"pyproject.toml says {name}>={bound}, but with the others it cannot be older than {version}")
    if wrong:
        return 1
    left_out = [f"--deselect=tests/server/test_api.py::{name}" for name in OF_PROGRAMS]
    command = [str(environment(pins)), "-m", "pytest", *left_out, *(arguments or TESTS)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
