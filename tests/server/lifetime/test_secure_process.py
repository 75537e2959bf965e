"""A whole server process with TLS, mutual TLS and tokens, and the project's own client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from manyhats.client import AuthenticationError, Client, Credentials, PermissionDeniedError, UnavailableError
from manyhats.server.access.tokens import Role, new_token
from support.servers.secure import Pki, add_token, make_pki

CHILD = """
import asyncio, sys, yaml
from manyhats.server.lifetime.config_file import make_config
from manyhats.server.lifetime.process import serve
from support.fakes.server import EchoEngine, MemoryStore, make_backend

config = make_config(yaml.safe_load(sys.argv[1]))
backend = make_backend(EchoEngine(), MemoryStore())
sys.exit(asyncio.run(serve(config, assemble=lambda config, metrics, progress: backend)))
"""


@contextmanager
def process(**settings: Any) -> Iterator[subprocess.Popen[str]]:
    given = {"model": "echo", "store": "/nowhere", "grpc_port": 0, "http_port": 0, "log_format": "json"}
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(given | settings, default=str)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


def ready(child: subprocess.Popen[str]) -> dict[str, str]:
    assert child.stdout is not None
    facts: dict[str, str] = json.loads(child.stdout.readline())
    return facts


def end(child: subprocess.Popen[str]) -> str:
    """The log of a server that was asked to end."""
    child.send_signal(signal.SIGTERM)
    _, log = child.communicate(timeout=20)
    assert child.returncode == 0
    return log


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return make_pki(tmp_path)


def test_other_machines_are_served_by_tls_and_tokens(pki: Pki) -> None:
    token_file = pki.directory / "tokens.yaml"
    token = add_token(token_file, "ci", [Role.GENERATE])
    key, chain = pki.client_pair()
    (pki.directory / "c.key").write_bytes(key)
    (pki.directory / "c.pem").write_bytes(chain)
    mine = Credentials(
        token=token,
        ca_file=pki.ca_file,
        cert_file=pki.directory / "c.pem",
        key_file=pki.directory / "c.key",
    )
    files = {"tls_cert": pki.files.certificate, "tls_key": pki.files.key, "tls_client_ca": pki.ca_file}
    with process(host="0.0.0.0", token_file=token_file, **files) as child:
        facts = ready(child)
        target = facts["grpc"].replace("0.0.0.0", "127.0.0.1")
        with Client(target, credentials=mine, timeout_s=10) as client:
            client.wait_ready(timeout_s=10)
            assert client.generate("hi").text == "hi"
            with pytest.raises(PermissionDeniedError):
                client.delete_adapter("hats")
        unknown = Credentials(
            token=new_token(), ca_file=mine.ca_file, cert_file=mine.cert_file, key_file=mine.key_file
        )
        with Client(target, credentials=unknown, timeout_s=10) as client, pytest.raises(AuthenticationError):
            client.generate("hi")
        stranger = Credentials(token=token, ca_file=mine.ca_file)
        with Client(target, credentials=stranger, timeout_s=10) as client, pytest.raises(UnavailableError):
            client.generate("hi")
        url = f"https://{facts['http'].replace('0.0.0.0', '127.0.0.1')}/readyz"
        with urllib.request.urlopen(url, timeout=5, context=pki.https()) as answer:
            assert answer.status == 200
        log = end(child)
    listening = next(line for line in map(json.loads, log.splitlines()) if line["event"] == "listening")
    assert (listening["tls"], listening["tokens"]) == (True, True)
    assert token not in log


def test_http_stays_in_the_clear_where_that_is_said(pki: Pki) -> None:
    with process(tls_cert=pki.files.certificate, tls_key=pki.files.key, http_insecure=True) as child:
        facts = ready(child)
        with urllib.request.urlopen(f"http://{facts['http']}/readyz", timeout=5) as answer:
            assert answer.status == 200
        with Client(facts["grpc"], credentials=Credentials(ca_file=pki.ca_file), timeout_s=10) as client:
            assert client.generate("hi").text == "hi"
        end(child)


@pytest.mark.parametrize("setting", ["tls_cert", "token_file"])
def test_file_that_cannot_be_read_is_one_line_and_an_error(pki: Pki, setting: str) -> None:
    settings = {"tls_cert": pki.files.certificate, "tls_key": pki.files.key} | {setting: pki.directory / "no"}
    with process(**settings) as child:
        out, log = child.communicate(timeout=30)
    assert (child.returncode, out) == (1, "")
    assert f"--{setting.replace('_', '-')}: cannot read" in log
    assert "Traceback" not in log
