"""TLS of both ports: one certificate, reloaded when its files change, and timely warnings before it expires.

The standard library only shows the dates of verified certificates or of authorities, so the few fields before the dates
are skipped here instead.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path

import structlog

from manyhats.server.access.errors import ConfigError
from manyhats.server.access.followed_files import FollowedFiles

_log = structlog.get_logger("manyhats.tls")

SOON = timedelta(days=14)
_PEM = re.compile(rb"-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----(.+?)-----END \1-----", re.DOTALL)
# Tags of ASN.1 (ITU-T X.690).
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


class Condition(Enum):
    """A certificate's condition at some time; the value is the log message."""

    VALID = "certificate is valid"
    NOT_YET_VALID = "certificate is not valid yet"
    EXPIRES_SOON = "certificate expires soon"
    EXPIRED = "certificate has expired"


@dataclass(frozen=True, slots=True)
class Validity:
    """When all certificates of a file are valid: from the latest start to the earliest end.

    Attributes:
        setting: whose file it is, ``tls_cert`` or ``tls_client_ca``.
    """

    setting: str
    begins: datetime
    ends: datetime

    def condition(self, now: datetime) -> Condition:
        """The condition at ``now``; certificates are valid at both of their dates."""
        if now > self.ends:
            return Condition.EXPIRED
        if now < self.begins:
            return Condition.NOT_YET_VALID
        return Condition.EXPIRES_SOON if self.ends - now < SOON else Condition.VALID


def validity_of(setting: str, pem: bytes) -> Validity:
    """The validity of all certificates in a PEM file.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    spans = [_validity(der) for der in _certificates(pem)]
    if not spans:
        raise ValueError("has no PEM certificate")
    return Validity(setting, max(begin for begin, _ in spans), min(end for _, end in spans))


class ExpiryWarnings:
    """Warns about certificates, once for each condition of each. Thread-safe.

    Args:
        clock: wall time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, tuple[Validity, Condition]] = {}

    def look(self, validities: Iterable[Validity]) -> None:
        """Warn about certificates whose condition has worsened since the last check."""
        now = datetime.fromtimestamp(self._clock(), UTC)
        with self._lock:
            for validity in validities:
                found = (validity, validity.condition(now))
                if self._said.get(validity.setting) != found:
                    self._said[validity.setting] = found
                    _say(*found)


def _say(validity: Validity, condition: Condition) -> None:
    if condition is Condition.VALID:
        return
    begins, ends = validity.begins.isoformat(), validity.ends.isoformat()
    _log.warning(condition.value, setting=validity.setting, not_before=begins, not_after=ends)


def _certificates(pem: bytes) -> Iterator[bytes]:
    """Each certificate in DER."""
    for match in _PEM.finditer(pem):
        try:
            yield base64.b64decode(b"".join(match[2].split()), validate=True)
        except binascii.Error as error:
            raise ValueError("has a certificate that is not base64") from error


def _validity(certificate: bytes) -> tuple[datetime, datetime]:
    """NotBefore and notAfter: RFC 5280, sections 4.1 and 4.1.2.5."""
    try:
        _, signed, _ = _element(certificate)
        _, fields, _ = _element(signed)
        tag, _, rest = _element(fields)
        num_before = 3 if tag == _VERSION else 2  # serial number, algorithm, issuer; a version may come first
        for _ in range(num_before):
            _, _, rest = _element(rest)
        tag, dates, _ = _element(rest)
        if tag != _SEQUENCE:
            raise ValueError("no validity where it should be")
        begin_tag, begin, rest = _element(dates)
        end_tag, end, _ = _element(rest)
        return _time(begin_tag, begin), _time(end_tag, end)
    except (IndexError, ValueError) as error:
        raise ValueError("has a certificate whose dates cannot be read") from error


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """Tag and content of the first element, and what follows it."""
    tag, length, begin = data[0], data[1], 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(data[2:begin], "big")
    if begin + length > len(data):
        raise ValueError("an element is cut off")
    return tag, data[begin : begin + length], data[begin + length :]


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # years 1950 to 2049
        text = ("19" if text >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time where it should be")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


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

    The HTTP port presents the same certificate; it asks for the client's but takes probes and scrapes, which have none,
    without. A certificate
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

    @property
    def is_outdated(self) -> bool:
        """Whether the files have changed and cannot be used: then they count as what they were."""
        return self._loaded.is_outdated

    async def follow_expiry(self, period_s: float = 60.0) -> None:
        """Warn about certificates that have expired or soon will; cancel to stop."""
        while True:
            self._warnings.look(self.current.validities)
            await asyncio.sleep(period_s)

    def _load(self) -> Identity:
        identity = read_identity(self._files)
        self._warnings.look(identity.validities)
        return identity


def read_identity(files: TlsFiles) -> Identity:
    """The content of the files.

    Raises:
        ConfigError: one cannot be read, or the key does not match the certificate.
    """
    http = _http_context(files)  # also checks that key and certificate belong together
    key, certificate = _read(files.key, "tls_key"), _read(files.certificate, "tls_cert")
    validities = [_validity_of("tls_cert", certificate)]
    authorities = None
    if files.client_ca is not None:
        authorities = _read(files.client_ca, "tls_client_ca")
        validities.append(_validity_of("tls_client_ca", authorities))
    return Identity(key, certificate, authorities, http, tuple(validities))


def _http_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and later, as gRPC's
    context.set_alpn_protocols(["http/1.1"])
    if files.client_ca is not None:
        # Probes and scrapers have none: calls are refused later, without one.
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=_authorities(files.client_ca))
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


def _authorities(file: Path) -> str:
    pem = _read(file, "tls_client_ca")
    try:
        text = pem.decode()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError("tls_client_ca", "has no PEM certificates") from error
    return text


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
