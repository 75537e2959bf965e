"""TLS and tokens of both clients, over a real port, and what they refuse to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from manyhats.client import (
    AsyncClient,
    Client,
    Credentials,
    CredentialsError,
    UnavailableError,
)
from manyhats.client.credentials import is_this_machine
from support.fakes.client import TEXT, FakeServer, running_server
from support.servers.secure import Pki, make_pki

TOKEN = "mh_a-token"

Use = Callable[[str, Credentials | None], None]


def use_client(target: str, credentials: Credentials | None, directory: Path | None = None) -> None:
    """Makes a call of every kind: health, unary, stream and, with a directory, an upload."""
    with Client(target, timeout_s=5, credentials=credentials) as client:
        client.wait_ready(timeout_s=2)
        assert client.generate("hi").text == TEXT
        with client.generate_stream("hi") as stream:
            assert stream.result().text == TEXT
        if directory is not None:
            client.upload_adapter("sql", directory)


def use_async_client(target: str, credentials: Credentials | None, directory: Path | None = None) -> None:
    async def use() -> None:
        async with AsyncClient(target, timeout_s=5, credentials=credentials) as client:
            await client.wait_ready(timeout_s=2)
            assert (await client.generate("hi")).text == TEXT
            async with client.generate_stream("hi") as stream:
                assert (await stream.result()).text == TEXT
            if directory is not None:
                await client.upload_adapter("sql", directory)

    asyncio.run(use())


both_clients = pytest.mark.parametrize("use", [use_client, use_async_client])


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return make_pki(tmp_path / "pki")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files to upload."""
    directory = tmp_path / "sql"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    return directory


@pytest.fixture
def tls_server(pki: Pki) -> Iterator[FakeServer]:
    pair = (pki.files.key.read_bytes(), pki.files.certificate.read_bytes())
    with running_server(grpc.ssl_server_credentials([pair])) as fake:
        yield fake


@both_clients
def test_token_goes_with_every_call_over_tls(
    use: Any, tls_server: FakeServer, pki: Pki, directory: Path
) -> None:
    use(tls_server.target, Credentials(ca_file=pki.ca_file, token=TOKEN), directory)
    assert set(tls_server.authorizations) == {f"Bearer {TOKEN}"}


@both_clients
def test_token_goes_with_every_call_to_this_machine(use: Any, fake: FakeServer, directory: Path) -> None:
    use(fake.target, Credentials(token=TOKEN), directory)
    assert set(fake.authorizations) == {f"Bearer {TOKEN}"}


@both_clients
def test_tls_without_a_token_shows_none(use: Any, tls_server: FakeServer, pki: Pki) -> None:
    use(tls_server.target, Credentials(ca_file=pki.ca_file))
    assert set(tls_server.authorizations) == {None}


@both_clients
def test_server_of_another_authority_is_not_talked_to(use: Any, tls_server: FakeServer, pki: Pki) -> None:
    other = make_pki(pki.directory / "other")
    for credentials in (Credentials(ca_file=other.ca_file, token=TOKEN), Credentials(tls=True, token=TOKEN)):
        with pytest.raises(UnavailableError):
            use(tls_server.target, credentials)
    assert tls_server.authorizations == []


@both_clients
def test_caller_shows_its_certificate_where_the_server_asks_for_one(use: Any, pki: Pki) -> None:
    key, chain = pki.client_pair()
    (pki.directory / "client.key").write_bytes(key)
    (pki.directory / "client.pem").write_bytes(chain)
    pair = (pki.files.key.read_bytes(), pki.files.certificate.read_bytes())
    server = grpc.ssl_server_credentials([pair], pki.ca_pem, require_client_auth=True)
    mine = Credentials(
        ca_file=pki.ca_file, cert_file=pki.directory / "client.pem", key_file=pki.directory / "client.key"
    )
    with running_server(server) as fake:
        use(fake.target, mine)
        with pytest.raises(UnavailableError):
            use(fake.target, replace(mine, cert_file=None, key_file=None))


@both_clients
@pytest.mark.parametrize("target", ["gpu-1:50051", "10.0.0.1:50051", "dns:///gpu-1:50051"])
def test_token_never_leaves_this_machine_in_the_clear(use: Use, target: str) -> None:
    with pytest.raises(CredentialsError, match="without TLS") as caught:
        use(target, Credentials(token=TOKEN))
    assert TOKEN not in str(caught.value)


def test_token_leaves_in_the_clear_only_where_that_is_said() -> None:
    credentials = Credentials(token=TOKEN, allow_clear_token=True)
    assert credentials.clear_metadata("gpu-1:50051") == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("dns:///localhost:50051", True),
        ("dns:localhost:50051", True),
        ("unix:/run/manyhats.sock", True),
        ("unix:///run/manyhats.sock", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("0.0.0.0:50051", False),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:50051", False),
        ("localhost.example.org:50051", False),
        ("127.0.0.1.example.org:50051", False),
        ("dns://127.0.0.1/example.org:50051", False),
        ("xds:///localhost", False),
        ("example.org/127.0.0.1", False),
        ("", False),
    ],
)
def test_which_targets_are_this_machine(target: str, expected: bool) -> None:
    assert is_this_machine(target) is expected


def test_credentials_do_not_show_their_token() -> None:
    assert TOKEN not in repr(Credentials(token=TOKEN))


@pytest.mark.parametrize("token", ["a b", "ä", "a\nb", "a\0"])
def test_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(CredentialsError, match="one word"):
        Client("127.0.0.1:1", credentials=Credentials(token=token))


def test_token_of_a_file_may_end_its_line() -> None:
    assert Credentials(token=f"{TOKEN}\n").clear_metadata("[::1]:1") == (
        ("authorization", f"Bearer {TOKEN}"),
    )


def test_files_that_cannot_be_used_are_one_clear_error(pki: Pki, tmp_path: Path) -> None:
    junk, missing = tmp_path / "junk", tmp_path / "missing"
    junk.write_text("junk")
    cert, key = pki.files.certificate, pki.files.key
    other = trustme.CA().issue_cert("x@example.org")
    other.private_key_pem.write_to_path(tmp_path / "other.key")
    unusable = {
        "cannot read .*missing": [
            Credentials(ca_file=missing),
            Credentials(cert_file=missing, key_file=key),
        ],
        "(no|not a) PEM": [
            Credentials(ca_file=junk),
            Credentials(cert_file=junk, key_file=key),
            Credentials(cert_file=cert, key_file=tmp_path / "other.key"),
        ],
        "given together": [Credentials(cert_file=cert), Credentials(key_file=key)],
    }
    for message, each in unusable.items():
        for credentials in each:
            with pytest.raises(CredentialsError, match=message):
                credentials.channel_credentials()
