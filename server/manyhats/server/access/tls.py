"""TLS of both ports: one certificate, read again when its files change."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from manyhats.server.access.certificates import ExpiryWarnings, Validity, validity_of
from manyhats.server.access.followed_files import FollowedFiles
from manyhats.server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server.

    Attributes:
        certificate: the server's, followed by those between it and its authority.
        key: the certificate's private key, without a passphrase.
        client_ca: authorities of client certificates; with it, gRPC callers must show one (mutual TLS).
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    grpc: grpc.ServerCertificateConfiguration
    http: ssl.SSLContext
    validities: tuple[Validity, ...]


class ServerTls:
    """The certificate of both ports. Connections that begin after its files changed get the new one.

    The HTTP port shows the same certificate, and asks for none: probes and scrapers have none to show. A certificate
    that is not valid, or not for long, is taken with a warning: callers are the ones to judge it.

    Args:
        files: where they are.
        clock: wall time, in seconds.

    Raises:
        ConfigError: a file cannot be read, or the key is not the certificate's.
    """

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.time) -> None:
        self._files = files
        self._warnings = ExpiryWarnings(clock)
        paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
        self._loaded = FollowedFiles(paths, self._load)
        self._given = self._loaded.current.grpc

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """What the gRPC port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._given,
            self._changed,  # type: ignore[arg-type]  # None is allowed: no change
            require_client_authentication=self._files.client_ca is not None,
        )

    def http_context(self) -> ssl.SSLContext:
        """What an HTTP connection that begins now is wrapped with."""
        return self._loaded.current.http

    @property
    def validities(self) -> tuple[Validity, ...]:
        """How long the server's certificate is valid, and the client authorities' where there are any."""
        return self._loaded.current.validities

    async def follow_expiry(self, period_s: float = 60.0) -> None:
        """Warn of certificates that expire, or are about to; cancel to stop."""
        while True:
            self._warnings.look(self.validities)
            await asyncio.sleep(period_s)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before every handshake, in its own thread; None is no change."""
        now = self._loaded.current.grpc
        if now is self._given:
            return None
        self._given = now
        return now

    def _load(self) -> _Loaded:
        files = self._files
        http = _http_context(files)  # also checks that key and certificate belong together
        pair = (_read(files.key, "tls_key"), _read(files.certificate, "tls_cert"))
        validities = [_validity_of("tls_cert", pair[1])]
        authorities = None
        if files.client_ca is not None:
            authorities = _read(files.client_ca, "tls_client_ca")
            _check_authorities(authorities)
            validities.append(_validity_of("tls_client_ca", authorities))
        self._warnings.look(validities)
        configuration = grpc.ssl_server_certificate_configuration([pair], authorities)
        return _Loaded(configuration, http, tuple(validities))


def _http_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and later, as gRPC's
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except ssl.SSLError as error:
        text = "no PEM certificate with its PEM key, without a passphrase"
        raise ConfigError("tls_cert", f"{files.certificate} and {files.key} are {text}") from error
    except OSError as error:
        raise ConfigError(
            "tls_cert", f"cannot read {files.certificate} or {files.key}: {error.strerror}"
        ) from error
    return context


def _no_passphrase() -> str:
    """Without this, OpenSSL would ask at the terminal; an empty one opens no key."""
    return ""


def _check_authorities(pem: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode())
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError("tls_client_ca", "holds no PEM certificates") from error


def _validity_of(setting: str, pem: bytes) -> Validity:
    try:
        return validity_of(setting, pem)
    except ValueError as error:
        raise ConfigError(setting, str(error)) from error


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(setting, f"cannot read {path}: {error.strerror}") from error
