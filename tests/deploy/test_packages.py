"""The source archive and the wheel: built, checked, and the client installed alone in a fresh environment."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks import environments

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")]
# Compressed, as an index sends them.
CLIENT_BYTES = 15_000_000
HEAVY = {"torch", "numpy", "transformers", "starlette", "pandas"}

pytestmark = pytest.mark.deploy


def run(command: Sequence[str | Path], cwd: Path = ROOT) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tools() -> Path:
    """The folder of the programs that build and check."""
    return environments.python_of(
        ROOT / ".deploy/packaging", Path(__file__).with_name("packaging.txt")
    ).parent


@pytest.fixture(scope="module")
def built(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source archive and wheel; the wheel is made of the archive."""
    folder = tmp_path_factory.mktemp("dist")
    run([tools / "python", "-m", "build", "--no-isolation", "--outdir", folder])
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def wheels(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and all that the client needs."""
    folder = tmp_path_factory.mktemp("wheels")
    only_wheels = ["--only-binary", ":all:"]
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *only_wheels,
            *CONSTRAINTS,
            "-d",
            folder,
            built[1],
        ]
    )
    return folder


@pytest.fixture(scope="module")
def client(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the client alone."""
    folder = tmp_path_factory.mktemp("client")
    run([sys.executable, "-m", "venv", folder])
    run([folder / "bin/pip", "install", "--quiet", "--no-index", "--find-links", wheels, "manyhats"])
    return folder / "bin"


def test_the_packages_pass_the_checks_of_an_index(tools: Path, built: tuple[Path, Path]) -> None:
    run([tools / "twine", "check", "--strict", *built])
    run([tools / "check-wheel-contents", built[1]])


def test_the_source_archive_has_every_file_of_a_checkout(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in run(["git", "ls-files", "-z"]).split("\0") if name}
    assert len(tracked) > 1000
    assert tracked - held == set()


def test_the_client_alone_is_small(wheels: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in wheels.iterdir()}
    assert sum(sizes.values()) <= CLIENT_BYTES, sizes


def test_the_client_alone_runs_without_the_servers_packages(client: Path, tmp_path: Path) -> None:
    listed = json.loads(run([client / "pip", "list", "--format", "json"]))
    assert not HEAVY & {each["name"].lower() for each in listed}
    assert "generate" in run([client / "manyhats", "--help"], tmp_path)
    code = "import manyhats.client, sys; print(sorted({'typer', 'rich', 'pydantic'} & sys.modules.keys()))"
    assert run([client / "python", "-W", "error", "-c", code], tmp_path) == "[]\n"


def test_types_are_found_where_the_wheel_is_installed(client: Path, tmp_path: Path) -> None:
    caller = tmp_path / "caller.py"
    caller.write_text(
        "import manyhats\n"
        "from manyhats.client import Client\n"
        "from manyhats.v1 import generation_pb2\n"
        "reveal_type(manyhats.__version__)\n"
        "reveal_type(Client('a:1').generate('x').text)\n"
        "reveal_type(generation_pb2.TokenIds())\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", tmp_path / "cache"]
    said = run([*mypy, "--python-executable", client / "python", caller], tmp_path)
    assert said.count('Revealed type is "str"') == 2
    assert said.count('Revealed type is "manyhats.v1.generation_pb2.TokenIds"') == 1
