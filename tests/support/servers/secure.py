"""Servers with certificates and tokens, and those who call them."""

from __future__ import annotations

import asyncio
import ssl
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import trustme

from manyhats.server.access.tls import ServerTls, TlsFiles
from manyhats.server.access.tokens import Role, TokenFile, new_token, token_entry
from support.fakes.server import Running, running_server

BOTH = (Role.GENERATE, Role.MANAGE)


@dataclass(frozen=True)
class Pki:
    """An authority, and the files of a server whose certificate it signed."""

    authority: trustme.CA
    directory: Path

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.directory / "server.pem", self.directory / "server.key")

    @property
    def mutual_files(self) -> TlsFiles:
        return TlsFiles(self.files.certificate, self.files.key, self.ca_file)

    @property
    def ca_file(self) -> Path:
        path = self.directory / "ca.pem"
        self.authority.cert_pem.write_to_path(path)
        return path

    @property
    def ca_pem(self) -> bytes:
        return self.authority.cert_pem.bytes()

    def issue(self, not_before: datetime | None = None, not_after: datetime | None = None) -> None:
        """Write a new certificate and key for 127.0.0.1 and localhost."""
        certificate = self.authority.issue_cert(
            "127.0.0.1", "localhost", not_before=not_before, not_after=not_after
        )
        write_pair(certificate, self.files)

    def client_pair(self, name: str = "caller") -> tuple[bytes, bytes]:
        """Key and certificate of a caller."""
        return pair_of(self.authority.issue_cert(f"{name}@example.org"))

    def channel_credentials(self, pair: tuple[bytes, bytes] | None = None) -> grpc.ChannelCredentials:
        key, chain = pair or (None, None)
        return grpc.ssl_channel_credentials(self.ca_pem, key, chain)

    def https(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.ca_pem.decode())


def make_pki(directory: Path) -> Pki:
    """A new authority with a server certificate in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    pki = Pki(trustme.CA(), directory)
    pki.issue()
    return pki


def pair_of(certificate: trustme.LeafCert) -> tuple[bytes, bytes]:
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    return certificate.private_key_pem.bytes(), chain


def write_pair(certificate: trustme.LeafCert, files: TlsFiles) -> None:
    key, chain = pair_of(certificate)
    files.certificate.write_bytes(chain)
    files.key.write_bytes(key)


def add_token(
    path: Path, name: str, roles: Sequence[Role] = BOTH, tasks: Sequence[str] = (), token: str = ""
) -> str:
    """Add a token to a token file, and give it back."""
    token = token or new_token()
    with path.open("a") as file:
        file.write(token_entry(name, token, roles, tasks))
    return token


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that shows a token."""
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def secured_server(
    *,
    tls: TlsFiles | None = None,
    token_file: Path | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    store: Any = None,
) -> AsyncIterator[Running]:
    """A server on fakes and free ports, and a channel that shows no token."""
    async with running_server(
        store=store,
        tls=None if tls is None else ServerTls(tls),
        tokens=None if token_file is None else TokenFile(token_file),
        credentials=credentials,
        needs_certificate=tls is not None and tls.client_ca is not None,
    ) as server:
        yield server


async def https_get(server: Running, context: ssl.SSLContext, path: str = "/readyz") -> str:
    """What the HTTP port answers."""

    def get() -> str:
        with urllib.request.urlopen(f"https://{server.http}{path}", timeout=5, context=context) as answer:
            return str(answer.read().decode().strip())

    return await asyncio.to_thread(get)
