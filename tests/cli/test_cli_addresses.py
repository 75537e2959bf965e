"""Addresses that are none, and ports at which something else listens: one line that says what to write."""

from __future__ import annotations

import socket
import ssl
import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from manyhats.cli.options.address import Listener, check_address, what_listens
from manyhats.cli.terminal.failures import UsageError
from manyhats.server.http.metrics_port import MetricsPort
from manyhats.server.http.probes import make_metrics_app
from manyhats.server.service.gate import Gate
from support.fakes.client import FakeServer, running_server
from support.servers.secure import make_pki

HOSTS = st.one_of(
    st.sampled_from(["localhost", "127.0.0.1", "[::1]", "gpu-1.example.org", "[fe80::1%eth0]"]),
    st.text(string.ascii_lowercase + string.digits + "-_.", min_size=1, max_size=30),
)
PORTS = st.integers(1, 65535)
SCHEMES = st.sampled_from(["http", "https", "grpc", "grpcs", "tcp", "HTTP", "h2c", "s3"])


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="manyhats")


@given(host=HOSTS, port=PORTS)
def test_host_and_port_are_an_address(host: str, port: int) -> None:
    assert check_address("--server", f"{host}:{port}") == f"{host}:{port}"


@pytest.mark.parametrize(
    "text", ["unix:/run/m.sock", "unix-abstract:m", "dns:///m:1", "ipv4:1.2.3.4:5", "ipv6:[::1]:5"]
)
def test_targets_of_grpc_itself_are_addresses(text: str) -> None:
    assert check_address("--server", text) == text


@given(scheme=SCHEMES, host=HOSTS, port=PORTS, path=st.sampled_from(["", "/", "/v1", "/v1?x=1"]))
def test_a_scheme_is_to_be_left_out(scheme: str, host: str, port: int, path: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_address("--server", f"{scheme}://{host}:{port}{path}")
    assert str(caught.value).startswith(
        f"--server must be HOST:PORT, without {scheme}://, as in {host}:{port}, not "
    )


@given(host=HOSTS, port=PORTS, path=st.sampled_from(["/", "/v1", "/healthz", "/v1/models?x"]))
def test_a_path_is_to_be_left_out(host: str, port: int, path: str) -> None:
    with pytest.raises(UsageError, match="without a path, as in"):
        check_address("--server", f"{host}:{port}{path}")


@given(host=st.text(string.ascii_lowercase + string.digits + "-.", min_size=1, max_size=30))
def test_a_missing_port_is_shown(host: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_address("--register", host)
    assert str(caught.value) == f"--register must be HOST:PORT, as in {host}:50051, not {host!r}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be HOST:PORT, not ''"),
        (":50051", "must be HOST:PORT, not ':50051'"),
        ("host:", "must be HOST:PORT, not 'host:'"),
        ("host:http", "must be HOST:PORT, not 'host:http'"),
        ("host:0", "a port from 1 to 65535"),
        ("host:65536", "a port from 1 to 65535"),
        ("host:٥٠", "must be HOST:PORT"),
        ("host: 50051", "must be HOST:PORT"),
        ("a host:50051", "must be HOST:PORT"),
        ("::1:50051", "in brackets, as in [::1]:50051"),
        ("fe80::1:50051", "in brackets, as in [fe80::1]:50051"),
        ("user@host:50051", "must be HOST:PORT"),
        ("http://", "without http://, not"),
        ("http://host", "without http://, not"),
        ("http://user:secret@host:5", "without http://, as in host:5, not"),
    ],
)
@pytest.mark.parametrize("command", [["info"], ["generate", "hi"], ["score", "a", "b"], ["adapters", "list"]])
def test_every_command_says_what_is_wrong_with_an_address(
    command: list[str], text: str, message: str
) -> None:
    result = run(*command, "--server", text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@contextmanager
def http_port(context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A manyhats server's HTTP port, or the same behind TLS; its address."""
    port = MetricsPort(
        make_metrics_app(Gate(heartbeat_limit_s=60), CollectorRegistry()), host="127.0.0.1", port=0, tls=None
    )
    port.start()
    try:
        if context is None:
            yield port.address
        else:
            with silent_tls(context) as address:
                yield address
    finally:
        port.stop()


@contextmanager
def silent_tls(context: ssl.SSLContext) -> Iterator[str]:
    """TLS without HTTP/2, as any HTTPS port; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(connection, server_side=True) as encrypted:
                        encrypted.recv(16)
                except OSError:
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("tls", [[], ["--tls"]])
def test_http_port_is_explained(tls: list[str]) -> None:
    with http_port() as address:
        assert what_listens(address) is Listener.HTTP
        result = run("info", "--server", address, *tls)
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"error: {address} is an HTTP port, as a server's --http-port: --server takes its"
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("tls", [[], ["--tls"]])
def test_https_port_is_explained(tmp_path: Path, tls: list[str]) -> None:
    pki = make_pki(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.files.certificate, pki.files.key)
    with http_port(context) as address:
        assert what_listens(address) is Listener.HTTPS
        result = run("info", "--server", address, "--timeout", "10", *tls)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"{address} is an HTTP port" in result.stderr


@pytest.mark.parametrize("is_mutual", [False, True])
def test_plaintext_to_a_port_of_tls_is_explained(tmp_path: Path, is_mutual: bool) -> None:
    pki = make_pki(tmp_path)
    pair = (pki.files.key.read_bytes(), pki.files.certificate.read_bytes())
    server = grpc.ssl_server_credentials(
        [pair], pki.ca_pem if is_mutual else None, require_client_auth=is_mutual
    )
    with running_server(server) as fake:
        assert what_listens(fake.target) is Listener.GRPC_TLS
        result = run("info", "--server", fake.target)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(
        f"error: the server at {fake.target} speaks TLS: add --tls, or --tls-ca FILE"
    )


def test_tls_to_a_port_of_plaintext_is_explained(fake: FakeServer, tmp_path: Path) -> None:
    assert what_listens(fake.target) is Listener.GRPC
    for flags in (["--tls"], ["--tls-ca", str(make_pki(tmp_path).ca_file)]):
        result = run("generate", "hi", "--server", fake.target, *flags)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith(
            f"error: the server at {fake.target} does not speak TLS: leave out --tls"
        )


def test_nothing_is_made_up_about_ports_that_are_closed_or_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert what_listens(f"127.0.0.1:{silent.getsockname()[1]}") is None
    assert what_listens("127.0.0.1:1") is None
    assert what_listens("unix:/nowhere") is None
