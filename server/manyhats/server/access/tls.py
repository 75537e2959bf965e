"""TLS of both ports: one certificate, reloaded when its files change."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manyhats.server.access.certificates import ExpiryWarnings, Validity, validity_of
from manyhats.server.access.followed_files import FollowedFiles
from manyhats.server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server.

    Attributes:
        certificate: the server's, followed by those between it and its authority.
        key: the certificate's private key, without a passphrase.
        client_ca: authorities of client certificates; if given, gRPC callers must present one (mutual TLS).
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """The content of the files; the same object as long as they do not change.

    Attributes:
        key, certificate, client_ca: PEM; ``client_ca`` is None if callers need no certificate.
        http: for HTTP, which requires no client certificate.
        validities: how long the certificate and any client authorities are valid.
    """

    key: bytes = field(repr=False)
    certificate: bytes
    client_ca: bytes | None
    http: ssl.SSLContext
    validities: tuple[Validity, ...]


class ServerTls:
    """The certificate of both ports. Connections that start after its files changed get the new one.

    The HTTP port presents the same certificate but requires none, since probes and scrapers have none. A certificate
    that is invalid, or soon will be, is accepted with a warning: judging it is up to callers.

    Args:
        files: where certificate and key are.
        clock: wall time, in seconds.

    Raises:
        ConfigError: a file cannot be read, or the key does not match the certificate.
    """

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.time) -> None:
        self._files = files
        self._warnings = ExpiryWarnings(clock)
        paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
        self._loaded = FollowedFiles(paths, self._load)

    @property
    def current(self) -> Identity:
        """What a connection that starts now uses. Thread-safe."""
        return self._loaded.current

    async def follow_expiry(self, period_s: float = 60.0) -> None:
        """Warn about certificates that have expired or soon will; cancel to stop."""
        while True:
            self._warnings.look(self.current.validities)
            await asyncio.sleep(period_s)

    def _load(self) -> Identity:
        files = self._files
        http = _http_context(files)  # also checks that key and certificate belong together
        key, certificate = _read(files.key, "tls_key"), _read(files.certificate, "tls_cert")
        validities = [_validity_of("tls_cert", certificate)]
        authorities = None
        if files.client_ca is not None:
            authorities = _read(files.client_ca, "tls_client_ca")
            _check_authorities(authorities)
            validities.append(_validity_of("tls_client_ca", authorities))
        self._warnings.look(validities)
        return Identity(key, certificate, authorities, http, tuple(validities))


def _http_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and later, as gRPC's
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except ssl.SSLError as error:
        text = "not a PEM certificate with its PEM key without a passphrase"
        raise ConfigError("tls_cert", f"{files.certificate} and {files.key} are {text}") from error
    except OSError as error:
        raise ConfigError(
            "tls_cert", f"cannot read {files.certificate} or {files.key}: {error.strerror}"
        ) from error
    return context


def _no_passphrase() -> str:
    """Without this, OpenSSL would ask on the terminal; an empty passphrase opens no key."""
    return ""


def _check_authorities(pem: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode())
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError("tls_client_ca", "has no PEM certificates") from error


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
