"""TLS of both ports, with certificates made here."""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.error
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from manyhats.server.access.errors import ConfigError
from manyhats.server.access.tls import ServerTls, TlsFiles
from manyhats.v1 import server_pb2
from manyhats.v1.server_pb2_grpc import ServerServiceStub
from support.fakes.server import Running, open_channel
from support.servers.secure import Pki, https_get, make_pki, pair_of, secured_server, write_pair


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return make_pki(tmp_path)


async def answers(server: Running, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether a call on a connection of its own is answered; it fails as unreachable otherwise."""
    async with open_channel(server.port.address, credentials) as channel:
        call = ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=10)
        code = await call.code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    return code is grpc.StatusCode.OK


async def test_grpc_is_encrypted_and_proves_who_answers(pki: Pki) -> None:
    stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
    async with secured_server(tls=pki.files) as server:
        assert await answers(server, pki.channel_credentials())
        assert not await answers(server, stranger)
        assert not await answers(server, None)


async def test_mutual_tls_lets_in_who_shows_a_certificate_of_its_authority(pki: Pki) -> None:
    async with secured_server(tls=pki.mutual_files) as server:
        assert await answers(server, pki.channel_credentials(pki.client_pair()))
        assert not await answers(server, pki.channel_credentials())
        stranger = pair_of(trustme.CA().issue_cert("caller@example.org"))
        assert not await answers(server, pki.channel_credentials(stranger))


async def test_http_shows_the_same_certificate_and_asks_for_none(pki: Pki) -> None:
    async with secured_server(tls=pki.mutual_files) as server:
        assert await https_get(server, pki.https()) == "ready"
        assert "manyhats_requests_running" in await https_get(server, pki.https(), "/metrics")
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            await https_get(server, ssl.create_default_context())


async def test_http_in_the_clear_is_not_answered_where_tls_is_on(pki: Pki) -> None:
    def clear(address: str) -> bytes:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            try:
                return client.recv(1000)
            except ConnectionResetError:
                return b""

    async with secured_server(tls=pki.files) as server:
        assert b"HTTP" not in await asyncio.to_thread(clear, server.http)


async def test_a_caller_that_never_shakes_hands_holds_up_nobody(pki: Pki) -> None:
    async with secured_server(tls=pki.files) as server:
        host, _, port = server.http.rpartition(":")
        with socket.create_connection((host, int(port))):
            assert await https_get(server, pki.https()) == "ready"


async def test_old_versions_of_tls_are_refused(pki: Pki) -> None:
    old = pki.https()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with secured_server(tls=pki.files) as server:
        with pytest.raises(urllib.error.URLError):
            await https_get(server, old)


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(pki: Pki) -> None:
    renewed = Pki(trustme.CA(), pki.directory)
    async with secured_server(tls=pki.files, credentials=pki.channel_credentials()) as server:
        await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        renewed.issue()
        assert await answers(server, renewed.channel_credentials())
        assert not await answers(server, pki.channel_credentials())
        assert await https_get(server, renewed.https()) == "ready"
        await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())


async def test_new_client_authorities_hold_for_new_connections(pki: Pki, tmp_path: Path) -> None:
    files = TlsFiles(pki.files.certificate, pki.files.key, tmp_path / "clients.pem")
    assert files.client_ca is not None
    clients = [trustme.CA(), trustme.CA()]
    clients[0].cert_pem.write_to_path(files.client_ca)
    first, second = (pair_of(each.issue_cert("caller@example.org")) for each in clients)
    async with secured_server(tls=files) as server:
        assert await answers(server, pki.channel_credentials(first))
        clients[1].cert_pem.write_to_path(files.client_ca)
        assert await answers(server, pki.channel_credentials(second))
        assert not await answers(server, pki.channel_credentials(first))


@pytest.mark.parametrize("fault", ["half", "junk", "gone"])
async def test_a_change_that_cannot_be_used_leaves_the_old_certificate(
    pki: Pki, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with secured_server(tls=pki.files) as server:
        if fault == "half":  # a certificate whose key is not written yet
            _, chain = pair_of(pki.authority.issue_cert("127.0.0.1"))
            pki.files.certificate.write_bytes(chain)
        elif fault == "junk":
            pki.files.key.write_text("no key")
        else:
            pki.files.certificate.unlink()
        assert await answers(server, pki.channel_credentials())
        assert await https_get(server, pki.https()) == "ready"
        pki.issue()
        assert await answers(server, pki.channel_credentials())
    said = capsys.readouterr()
    assert (said.out + said.err).count("the old content stays") == 1


def test_files_that_cannot_be_used_are_one_clear_error(pki: Pki, tmp_path: Path) -> None:
    files, missing, junk = pki.files, tmp_path / "missing", tmp_path / "junk"
    junk.write_text("junk")
    other = TlsFiles(tmp_path / "other.pem", tmp_path / "other.key")
    write_pair(trustme.CA().issue_cert("127.0.0.1"), other)
    unusable = [
        (TlsFiles(missing, files.key), "tls_cert"),
        (TlsFiles(files.certificate, missing), "tls_cert"),
        (TlsFiles(files.certificate, tmp_path), "tls_cert"),
        (TlsFiles(junk, files.key), "tls_cert"),
        (TlsFiles(files.certificate, junk), "tls_cert"),
        (TlsFiles(files.certificate, other.key), "tls_cert"),
        (TlsFiles(files.certificate, files.key, missing), "tls_client_ca"),
        (TlsFiles(files.certificate, files.key, junk), "tls_client_ca"),
        (TlsFiles(files.certificate, files.key, files.key), "tls_client_ca"),
    ]
    for each, setting in unusable:
        with pytest.raises(ConfigError) as caught:
            ServerTls(each)
        assert caught.value.setting == setting


def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(pki: Pki) -> None:
    key = serialization.load_pem_private_key(pki.files.key.read_bytes(), password=None)
    pki.files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="without a passphrase"):
        ServerTls(pki.files)
