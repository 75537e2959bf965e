"""``manyhats adapters verify``, ``gc`` and ``export`` on a store, without a server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.cli.main import app
from support.factories.adapters import make_base, make_lora

BASE = make_base()


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["adapters", *args], prog_name="manyhats")


def open_in(directory: Path) -> AdapterStore:
    return open_store(directory / "store", BASE, [directory])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a plain task and a composed one of two parts, one of them the plain one's."""
    for seed, name in enumerate(("sql", "polite")):
        make_lora(tmp_path / name, BASE, seed=seed)
    adapters = open_in(tmp_path)
    adapters.register(Registration("sql", Uri(str(tmp_path / "sql"))))
    parts = [Part(str(tmp_path / "sql")), Part(str(tmp_path / "polite"), 0.5)]
    adapters.register(Registration("both", Parts(parts)))
    adapters.close()
    return tmp_path / "store"


def weights_of(store: Path, name: str) -> Path:
    """The stored weights of the part that ``name`` was registered from."""
    source = (store.parent / name / "adapter_model.safetensors").read_bytes()
    (found,) = [path for path in store.rglob("adapter_model.safetensors") if path.read_bytes() == source]
    return found


def test_verify_names_every_artifact_and_its_versions(store: Path) -> None:
    result = run("verify", "--store", str(store))
    assert (result.exit_code, result.stderr) == (
        0,
        f"stored adapters in {store}: 2, all as they were registered\n",
    )
    header, *rows = (line.split("\t") for line in result.stdout.splitlines())
    assert header == ["digest", "status", "versions"]
    assert sorted((status, versions) for _, status, versions in rows) == [
        ("ok", "both@1"),
        ("ok", "both@1, sql@1"),
    ]


def test_verify_finds_damage_and_fails_the_versions_that_have_it(store: Path) -> None:
    weights = weights_of(store, "polite")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    os.chmod(weights, 0o644)
    weights.write_bytes(content)
    result = run("verify", "--store", str(store), "--json")
    assert result.exit_code == 1
    assert result.stderr == f"error: damaged or missing: 1 of 2 stored adapters in {store}\n"
    found = json.loads(result.stdout)
    assert sorted((each["status"], each["names"]) for each in found) == [
        ("damaged", ["both@1"]),
        ("ok", ["both@1", "sql@1"]),
    ]
    adapters = open_in(store.parent)
    states = {record.name: record.state.value for record in adapters.list().records}
    adapters.close()
    assert states == {"both@1": "failed", "sql@1": "active"}


def test_gc_removes_what_no_version_needs_and_nothing_else(store: Path) -> None:
    needed = sorted(store.rglob("*.safetensors"))
    orphan = weights_of(store, "polite").parent.with_name("ab" * 32)
    orphan.mkdir()
    (orphan / "adapter_model.safetensors").write_bytes(b"x" * 1500)
    result = run("gc", "--store", str(store))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"removed from {store} what no version needs: 1 (1.5 kB); unfinished: 0\n"
    assert sorted(store.rglob("*.safetensors")) == needed
    swept = json.loads(run("gc", "--store", str(store), "--older-than", "0", "--json").stdout)
    assert swept == {"num_artifacts": 0, "num_unfinished": 0, "size_bytes": 0}
    assert sorted(store.rglob("*.safetensors")) == needed


def test_export_writes_what_was_registered(store: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "sql"
    result = run("export", "sql", str(target), "--store", str(store))
    assert result.exit_code == 0
    assert sorted(result.stdout.splitlines()) == sorted(str(path) for path in target.iterdir())
    for path in target.iterdir():
        assert path.read_bytes() == (tmp_path / "sql" / path.name).read_bytes()
    written = json.loads(
        run("export", "both@1", str(tmp_path / "both"), "--store", str(store), "--json").stdout
    )
    assert {Path(path).parent.name for path in written} == {"part-0", "part-1"}


def test_export_into_a_directory_with_something_in_it_is_refused(store: Path, tmp_path: Path) -> None:
    result = run("export", "sql", str(tmp_path / "polite"), "--store", str(store))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: DIR: is not empty\n"


@pytest.mark.parametrize("command", [["verify"], ["gc"], ["export", "sql", "out"]], ids=lambda c: c[0])
def test_store_that_is_not_there_is_not_made(tmp_path: Path, command: list[str]) -> None:
    result = run(*command, "--store", str(tmp_path / "nowhere"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: store: there is no store")
    assert f"looked in {tmp_path / 'nowhere'}" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_store_at_a_url_needs_its_catalogue() -> None:
    result = run("verify", "--store", "memory://nowhere")
    assert result.exit_code == 1
    assert "catalogue" in result.stderr


def test_unknown_version_is_named(store: Path, tmp_path: Path) -> None:
    result = run("export", "sql@7", str(tmp_path / "x"), "--store", str(store))
    assert (result.exit_code, result.stderr) == (1, f"error: sql@7: no such version (looked in {store})\n")


@pytest.mark.parametrize("command", [["verify"], ["gc"], ["export", "sql", "out"]], ids=lambda c: c[0])
def test_without_a_store_the_default_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path / "home"))
    result = run(*command)
    assert result.exit_code == 1
    assert f"looked in {tmp_path / 'home' / 'store'}; --store names the one a server uses" in result.stderr


def test_a_task_that_is_not_in_the_store_names_the_store(store: Path, tmp_path: Path) -> None:
    result = run("export", "sqq", str(tmp_path / "out"), "--store", str(store))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: sqq: no such task (looked in {store})\n"
