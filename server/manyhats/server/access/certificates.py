"""How long certificates are valid, and timely warnings.

The standard library only shows the dates of verified certificates or of authorities, so the few fields before the dates
are skipped here instead.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

import structlog

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
        """Warn about what has become worse since the last check."""
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
            raise ValueError("has no validity where it should be")
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
