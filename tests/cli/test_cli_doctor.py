"""``manyhats doctor`` as its user sees it: lines, JSON, exit codes, and a running server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import manyhats
from manyhats.cli.doctor.command import line
from manyhats.cli.main import app
from manyhats.server.access.tokens import Role
from manyhats.server.doctor.finding import warning
from support.factories.tiny_models import make_checkpoint
from support.fakes.server import MemoryStore, Running, make_record
from support.servers.secure import Pki, add_token, make_pki, secured_server

pytestmark = pytest.mark.usefixtures("own_logs")

COMMAND = [sys.executable, "-m", "manyhats.cli", "doctor"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def sound(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a server that would work."""
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path / "home"))
    return ["--model", str(checkpoint), "--grpc-port", "0", "--http-port", "0"]


def run_process(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *args], prog_name="manyhats")


def failures(result: Result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith("failure")]


def test_a_sound_installation_is_ok_in_every_line(sound: list[str], tmp_path: Path) -> None:
    result = run_process(*sound)
    assert (result.returncode, result.stderr.startswith("failures: 0, ")) == (0, True), result.stdout
    subjects = [line.partition(":")[0].split(maxsplit=1)[1] for line in result.stdout.splitlines()]
    assert subjects == [
        "Python",
        "packages of manyhats[server]",
        "settings",
        "compiled kernels",
        "processor",
        "NF4 linears",
        "dense linears",
        "threads",
        "threads of the kernels",
        "device",
        "model",
        "memory",
        "store",
        "tokens",
        "TLS",
        "gRPC port",
        "HTTP port",
        "event loop",
        "open files",
    ]
    # No store is made, no weights are quantized, no kernel is compiled; digests that were computed are remembered.
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"digests", "kernels"}
    assert not [path for path in (tmp_path / "home/kernels").rglob("*") if path.is_file()]


def test_json_has_every_finding_and_the_exit_code_tells_of_failures(sound: list[str], tmp_path: Path) -> None:
    result = run(
        *sound, "--json", "--token-file", str(tmp_path / "none.yaml"), "--host", "192.0.2.1", "--insecure"
    )
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (1, "")
    bad = {each["subject"] for each in found if each["condition"] == "failure"}
    assert bad == {"tokens", "gRPC port", "HTTP port"}
    assert all(each["advice"] for each in found if each["condition"] != "ok")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--max-sequences", "0"], "--max-sequences: must be at least 1"),
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached by other machines"),
        (["--register", "sql=/nowhere"], "--register: sql: "),
    ],
)
def test_settings_that_serve_refuses_are_failures(sound: list[str], flags: list[str], text: str) -> None:
    result = run(*sound, *flags)
    assert result.exit_code == 1
    (failure,) = failures(result)
    assert failure.startswith(f"failure  settings: {text}")


def test_unknown_variables_are_failures(sound: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHATS_MAX_TASK", "5")
    (failure,) = failures(run(*sound))
    assert "MANYHATS_MAX_TASK" in failure
    assert "MAX_TASKS" in failure


def test_settings_come_from_variables_and_files_as_for_serve(
    sound: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHATS_MODEL", "/no/such/model")
    (failure,) = failures(run(*sound[2:]))
    assert "/no/such/model" in failure
    file = tmp_path / "server.yaml"
    file.write_text("device: cuda\n")
    (failure,) = failures(run(*sound, "--config", str(file)))
    assert failure.startswith("failure  device: device: torch ")


def test_without_the_servers_packages_only_that_is_said(tmp_path: Path) -> None:
    directory = tmp_path / "manyhats-9.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: manyhats\nVersion: 9\nProvides-Extra: server\n"
        'Requires-Dist: not-there; extra == "server"\n'
    )
    code = (
        "import sys; sys.modules.update(torch=None, yaml=None, structlog=None, sqlalchemy=None)\n"
        "from manyhats.cli.main import app; app()"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (1, "failures: 1, warnings: 0\n")
    python, packages = result.stdout.splitlines()
    assert python.startswith("ok       Python: 3.")
    assert packages.startswith("failure  packages of manyhats[server]: missing: not-there -> install ")


def test_an_error_that_nobody_foresaw_is_a_failure_and_the_rest_is_still_looked_at(sound: list[str]) -> None:
    result = run_process(*sound, NUMBA_THREADING_LAYER="nonsense")
    assert result.returncode == 1
    (failure,) = (line for line in result.stdout.splitlines() if line.startswith("failure"))
    assert failure.startswith("failure  processor: ")
    assert "event loop" in result.stdout


def test_a_finding_is_one_line_whatever_is_in_it() -> None:
    assert line(warning("a", "b\nc\x1b[31m", "d\te")) == "warning  a: b c [31m -> d e"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return make_pki(tmp_path / "pki")


async def look(server: Running, sound: list[str], *flags: str) -> dict[str, tuple[str, str]]:
    """What is found of a running server, by subject."""
    http = server.http.rpartition(":")[2]
    args = [
        *sound[:2],
        "--http-port",
        http,
        "--server",
        server.port.address,
        "--timeout",
        "5",
        "--json",
        *flags,
    ]
    result = await asyncio.to_thread(run, *args)
    found = {each["subject"]: (each["condition"], each["text"]) for each in json.loads(result.stdout)}
    assert "gRPC port" not in found  # they are the server's
    return found


async def test_a_running_server_is_called(sound: list[str], pki: Pki, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    token = add_token(tokens, "ci", [Role.GENERATE])
    key, chain = pki.client_pair()
    (tmp_path / "c.key").write_bytes(key)
    (tmp_path / "c.pem").write_bytes(chain)
    caller = ["--caller-cert", str(tmp_path / "c.pem"), "--caller-key", str(tmp_path / "c.key")]
    trust = ["--tls-ca", str(pki.ca_file), "--token", token]
    store = MemoryStore(tasks={"hats": [make_record("hats")]})
    async with secured_server(tls=pki.mutual_files, token_file=tokens, store=store) as server:
        found = await look(server, sound, *trust, *caller)
        assert found["server"] == ("ok", f"{server.port.address} is ready")
        assert found["token"] == ("ok", "taken")
        assert found["version"] == ("ok", manyhats.__version__)
        assert found["task"] == ("ok", "hats@1 answers")
        assert found["metrics"][0] == "ok"
        found = await look(server, sound, *trust)
        assert found["server"][0] == "failure"
        wrong = await look(server, sound, *caller, "--tls-ca", str(pki.ca_file), "--token", "mh_wrong")
        assert wrong["server"][0] == "failure"
        assert "token" in wrong["server"][1]


async def test_a_token_that_may_not_generate_is_a_warning(sound: list[str], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    token = add_token(tokens, "ops", [Role.MANAGE])
    async with secured_server(token_file=tokens) as server:
        found = await look(server, sound, "--token", token)
    assert (found["task"][0], found["metrics"][0]) == ("warning", "ok")


async def test_a_server_without_metrics_where_the_settings_say_fails(sound: list[str]) -> None:
    async with secured_server() as server:
        args = [*sound[:2], "--http-port", "1", "--server", server.port.address, "--json"]
        result = await asyncio.to_thread(run, *args)
    found = {each["subject"]: each["condition"] for each in json.loads(result.stdout)}
    assert (found["server"], found["metrics"], result.exit_code) == ("ok", "failure", 1)


def test_no_server_fails(sound: list[str]) -> None:
    (failure,) = failures(run(*sound[:2], "--server", "127.0.0.1:1", "--timeout", "2"))
    assert failure.startswith("failure  server: ")
