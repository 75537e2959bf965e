"""A real Envoy, with the certificates of docs/replicas.md on both sides, in front of a server with tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from manyhats.client import AsyncClient, AuthenticationError, Credentials, UnavailableError
from support.servers.replicas import Envoy, Replica
from support.servers.secure import Pki, add_token, make_pki, pair_of, secured_server, write_pair

pytestmark = pytest.mark.deploy

REPLICAS = "replicas.example.org"


@asynccontextmanager
async def secured(directory: Path, name: str) -> AsyncIterator[tuple[Envoy, Pki, str]]:
    """Envoy's place in front of a server with a certificate of this name, the authority, and a token."""
    pki = make_pki(directory / "pki")
    write_pair(pki.authority.issue_cert(name), pki.files)
    token_file = pki.directory / "tokens.yaml"
    token = add_token(token_file, "one")
    key, chain = pair_of(pki.authority.issue_cert("localhost"))
    proxy = directory / "envoy"
    proxy.mkdir()
    for file, content in (("proxy.key", key), ("proxy.pem", chain), ("ca.pem", pki.ca_pem)):
        (proxy / file).write_bytes(content)
    async with secured_server(
        tls=pki.files, token_file=token_file, credentials=pki.channel_credentials()
    ) as server:
        ports = [int(address.rpartition(":")[2]) for address in (server.port.address, server.http)]
        replica = Replica(directory, {}, *ports)
        yield Envoy(proxy, (replica, replica)), pki, token


async def test_calls_pass_encrypted_with_their_tokens(tmp_path: Path) -> None:
    async with secured(tmp_path, REPLICAS) as (envoy, pki, token), envoy.running(secure=True):
        target = f"localhost:{envoy.port}"
        async with AsyncClient(target, credentials=Credentials(ca_file=pki.ca_file, token=token)) as client:
            assert (await client.generate("hi")).text == "hi"
        unknown = Credentials(ca_file=pki.ca_file, token="mh_unknown")
        async with AsyncClient(target, credentials=unknown) as client:
            with pytest.raises(AuthenticationError):
                await client.generate("hi")
        async with httpx2.AsyncClient(verify=pki.https(), base_url=f"https://{target}") as http:
            for headers, status in (({"authorization": f"Bearer {token}"}, 200), ({}, 401)):
                body = {"model": "", "prompt": "hi", "max_tokens": 2}
                answer = await http.post("/v1/completions", json=body, headers=headers)
                assert answer.status_code == status


async def test_a_server_of_another_name_is_not_taken_for_a_replica(tmp_path: Path) -> None:
    async with (
        secured(tmp_path, "other.example.org") as (envoy, pki, token),
        envoy.running(secure=True, num_ready=0),
    ):
        credentials = Credentials(ca_file=pki.ca_file, token=token)
        async with AsyncClient(f"localhost:{envoy.port}", credentials=credentials) as client:
            with pytest.raises(UnavailableError, match="no healthy upstream"):
                await client.generate("hi")
