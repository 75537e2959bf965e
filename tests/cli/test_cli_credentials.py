"""Tokens and TLS at the command line: making tokens, and showing them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from manyhats.server.access.tokens import Role, Scope, parse_tokens
from support.fakes.client import FakeServer, make_status, running_server
from support.servers.secure import make_pki

COMMANDS = [
    ["generate", "hi"],
    ["score", "2+2=", " 4"],
    ["embed", "hi"],
    ["classify", "--task", "mood", "hi"],
    ["tag", "--task", "ner", "hi"],
    ["rerank", "--task", "docs", "q", "hi"],
    ["info"],
    ["adapters", "list"],
    ["adapters", "show", "sql"],
    ["adapters", "delete", "sql"],
    ["adapters", "activate", "sql@1"],
    ["adapters", "register", "sql", "/adapters/sql"],
]


def run(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(app, list(args), prog_name="manyhats")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_client_command_shows_its_token(fake: FakeServer, command: list[str]) -> None:
    assert run(*command, "--server", fake.target, "--token", "mh_flag").exit_code == 0
    assert run(*command, "--server", fake.target, env={"MANYHATS_TOKEN": "mh_env"}).exit_code == 0
    assert fake.authorizations[0] == "Bearer mh_flag"
    assert fake.authorizations[-1] == "Bearer mh_env"


def test_tls_by_flags_and_by_environment(tmp_path: Path) -> None:
    pki = make_pki(tmp_path)
    pair = (pki.files.key.read_bytes(), pki.files.certificate.read_bytes())
    server = grpc.ssl_server_credentials([pair], pki.ca_pem, require_client_auth=True)
    key, chain = pki.client_pair()
    (tmp_path / "c.key").write_bytes(key)
    (tmp_path / "c.pem").write_bytes(chain)
    files = {"CA": pki.ca_file, "CERT": tmp_path / "c.pem", "KEY": tmp_path / "c.key"}
    with running_server(server) as fake:
        flags = [text for name, file in files.items() for text in (f"--tls-{name.lower()}", str(file))]
        assert run("info", "--server", fake.target, *flags).exit_code == 0
        env = {f"MANYHATS_TLS_{name}": str(file) for name, file in files.items()}
        assert run("info", "--server", fake.target, env=env).exit_code == 0
        unencrypted = run("info", "--server", fake.target)
    assert (unencrypted.exit_code, unencrypted.stderr.count("\n")) == (1, 1)


def test_token_for_another_machine_needs_tls_or_a_word() -> None:
    refused = run("info", "--server", "gpu-1.invalid:1", "--token", "mh_secret", "--timeout", "5")
    assert refused.exit_code == 1
    assert "--tls-ca" in refused.stderr
    assert "mh_secret" not in refused.output
    said = run(
        "info", "--server", "gpu-1.invalid:1", "--token", "mh_secret", "--token-in-clear", "--timeout", "5"
    )
    assert "cannot reach" in said.stderr


def test_a_missing_token_says_how_to_show_one(fake: FakeServer) -> None:
    fake.status = make_status(grpc.StatusCode.UNAUTHENTICATED, "needs a token", reason="CREDENTIAL_MISSING")
    result = run("info", "--server", fake.target)
    assert result.exit_code == 1
    assert "MANYHATS_TOKEN" in result.stderr


def test_new_token_is_printed_once_and_its_entry_added(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    first = run("token", "new", "ci", "--file", str(file), "--task", "sql", "--task", "_base")
    second = run(
        "token", "new", "ops", "--file", str(file), "--role", "manage", "--role", "generate", "--json"
    )
    token, made = first.stdout.strip(), json.loads(second.stdout)
    tokens = parse_tokens(file.read_text(), "tokens")
    ci, ops = tokens.caller(token), tokens.caller(made["token"])
    assert ci is not None
    assert ops is not None
    assert (ci.name, ci.roles, ci.scope) == ("ci", {Role.GENERATE}, Scope(("sql", "_base")))
    assert (ops.name, ops.roles, ops.scope) == ("ops", {Role.GENERATE, Role.MANAGE}, Scope())
    assert token not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_adding_keeps_what_the_file_has_and_its_mode(tmp_path: Path) -> None:
    file, link = tmp_path / "tokens.yaml", tmp_path / "link"
    file.write_text("# ours")
    file.chmod(0o640)
    link.symlink_to(file)
    assert run("token", "new", "ci", "--file", str(link)).exit_code == 0
    assert file.read_text().startswith("# ours\n- name: ci\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "code", "fault"),
    [
        (("ci",), 1, "two tokens with the name ci"),
        (("a b",), 1, "name"),
        (("new", "--task", "SQL"), 1, "a task consists of"),
        (("new", "--role", "admin"), 2, "--role"),
    ],
)
def test_entries_that_are_none_change_nothing(
    tmp_path: Path, arguments: tuple[str, ...], code: int, fault: str
) -> None:
    file = tmp_path / "tokens.yaml"
    run("token", "new", "ci", "--file", str(file))
    before = file.read_bytes()
    result = run("token", "new", *arguments, "--file", str(file))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert fault in result.stderr
    assert file.read_bytes() == before


def test_files_that_cannot_be_read_or_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "faulty").write_text("- half")
    for path in (tmp_path, tmp_path / "none" / "tokens.yaml", tmp_path / "faulty"):
        result = run("token", "new", "ci", "--file", str(path))
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
