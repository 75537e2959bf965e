"""Certificates that are not valid, or not for long: a warning, and a metric of days left."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.server.access.tls import ExpiryWarnings, ServerTls, TlsFiles, Validity, validity_of
from support.fakes.server import Running, eventually
from support.servers.secure import Pki, https_get, make_pki, secured_server

NOW = datetime(2030, 5, 17, 12, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(begins: datetime, ends: datetime, *, name: str = "someone", serial: int = 1) -> bytes:
    """A self-signed one, in PEM."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(serial)
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(KEY, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


def write_own_pair(directory: Path, pem: bytes) -> TlsFiles:
    """A server's files, with the certificate as its own authority."""
    files = TlsFiles(directory / "own.pem", directory / "own.key", directory / "own.pem")
    files.certificate.write_bytes(pem)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(KEY.private_bytes(encoding, form, serialization.NoEncryption()))
    return files


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is warned of: words and setting."""
    lines: list[str] = []

    def keep(_logger: object, method: str, event: MutableMapping[str, object]) -> NoReturn:
        if method == "warning":
            lines.append(f"{event['event']}: {event['setting']}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep])
    yield lines
    structlog.configure(**before)


# Of at most 64 bytes, which is all that the library takes.
names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60
).filter(lambda name: len(name.encode()) <= 64)
times = st.datetimes(datetime(1950, 1, 1), datetime(9998, 1, 1)).map(lambda at: at.replace(microsecond=0))


@settings(max_examples=60, deadline=None)
@given(
    dates=st.tuples(times, times).map(sorted),
    name=names,
    serial=st.integers(1, 2**150),
)
def test_dates_are_read_as_the_cryptography_library_reads_them(
    dates: list[datetime], name: str, serial: int
) -> None:
    pem = certificate(*dates, name=name, serial=serial)
    theirs = x509.load_pem_x509_certificate(pem)
    ours = validity_of("tls_cert", pem)
    assert (ours.begins, ours.ends) == (theirs.not_valid_before_utc, theirs.not_valid_after_utc)


def test_a_file_is_valid_while_all_its_certificates_are() -> None:
    chain = [certificate(NOW - 3 * DAY, NOW + 9 * DAY), certificate(NOW - 9 * DAY, NOW + 3 * DAY)]
    text = b"Subject: a note\n" + b"\n".join(chain).replace(b"\n", b"\r\n")
    for pem in (text, text.replace(b" CERTIFICATE", b" X509 CERTIFICATE")):
        assert validity_of("tls_cert", pem) == Validity("tls_cert", NOW - 3 * DAY, NOW + 3 * DAY)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_certificate_is_read_or_refused(data: st.DataObject) -> None:
    der = bytearray(ssl.PEM_cert_to_DER_cert(certificate(NOW, NOW + DAY).decode()))
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    pem = ssl.DER_cert_to_PEM_cert(bytes(der[: data.draw(st.integers(0, 400))])).encode()
    try:
        validity_of("tls_cert", pem)
    except ValueError as error:
        assert "certificate" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("begins", "ends", "words"),
    [
        (-9 * DAY, 15 * DAY, []),
        (-9 * DAY, 13 * DAY, ["certificate expires soon: tls_cert"]),
        (-9 * DAY, timedelta(0), ["certificate expires soon: tls_cert"]),
        (-9 * DAY, -timedelta(seconds=1), ["certificate has expired: tls_cert"]),
        (timedelta(0), 100 * DAY, []),
        (timedelta(seconds=1), 100 * DAY, ["certificate is not valid yet: tls_cert"]),
        (DAY, 2 * DAY, ["certificate is not valid yet: tls_cert"]),
    ],
)
def test_each_condition_is_said_once(
    said: list[str], begins: timedelta, ends: timedelta, words: list[str]
) -> None:
    warnings = ExpiryWarnings(clock=NOW.timestamp)
    for _ in range(3):
        warnings.look([Validity("tls_cert", NOW + begins, NOW + ends)])
    assert said == words


def test_a_certificate_that_grows_old_is_warned_of_before_and_when_it_expires(said: list[str]) -> None:
    clock = [NOW.timestamp()]
    warnings = ExpiryWarnings(clock=lambda: clock[0])
    validities = [
        Validity("tls_cert", NOW - DAY, NOW + 30 * DAY),
        Validity("tls_client_ca", NOW, NOW + 40 * DAY),
    ]
    for _ in range(50):
        warnings.look(validities)
        clock[0] += DAY.total_seconds()
    assert said == [
        "certificate expires soon: tls_cert",
        "certificate expires soon: tls_client_ca",
        "certificate has expired: tls_cert",
        "certificate has expired: tls_client_ca",
    ]


@pytest.mark.parametrize(
    ("begins", "ends", "word"),
    [
        (-9 * DAY, -DAY, "certificate has expired"),
        (DAY, 90 * DAY, "certificate is not valid yet"),
        (-9 * DAY, DAY, "certificate expires soon"),
    ],
)
async def test_a_good_certificate_replaced_by_a_bad_one_is_warned_of_and_measured(
    tmp_path: Path, said: list[str], begins: timedelta, ends: timedelta, word: str
) -> None:
    pki, now = make_pki(tmp_path), datetime.now(UTC)
    pki.issue(not_after=now + 90 * DAY)
    async with secured_server(tls=pki.files) as server:
        assert await days_left(server, pki) == pytest.approx({"tls_cert": 90}, abs=0.1)
        assert said == []
        pki.issue(now + begins, now + ends)
        registry = server.metrics.registry
        labels = {"file": "tls_cert"}
        end_s = registry.get_sample_value("manyhats_tls_not_after_timestamp_seconds", labels)
        assert end_s == int((now + ends).timestamp())
        assert said == [f"{word}: tls_cert"]
        pki.issue(not_after=now + 90 * DAY)
        assert await days_left(server, pki) == pytest.approx({"tls_cert": 90}, abs=0.1)
    assert said == [f"{word}: tls_cert"]


async def days_left(server: Running, pki: Pki) -> dict[str, float]:
    """By file, as a scraper reads it."""
    name, now_s = "manyhats_tls_not_after_timestamp_seconds", datetime.now(UTC).timestamp()
    text = await https_get(server, pki.https(), "/metrics")
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return {line.split('"')[1]: (float(line.rpartition(" ")[2]) - now_s) / 86_400 for line in lines}


async def test_client_authorities_are_warned_of_and_measured_too(tmp_path: Path, said: list[str]) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    files = write_own_pair(tmp_path, certificate(now - 9 * DAY, now - DAY))
    tls = ServerTls(files)
    assert said == ["certificate has expired: tls_cert", "certificate has expired: tls_client_ca"]
    assert {each.setting: each.ends for each in tls.current.validities} == {
        "tls_cert": now - DAY,
        "tls_client_ca": now - DAY,
    }


async def test_expiry_is_noticed_without_a_connection(tmp_path: Path, said: list[str]) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    clock = [now.timestamp()]
    tls = ServerTls(write_own_pair(tmp_path, certificate(now - DAY, now + 90 * DAY)), clock=lambda: clock[0])
    following = asyncio.create_task(tls.follow_expiry(period_s=0.001))
    await asyncio.sleep(0.02)
    assert said == []
    clock[0] += 91 * DAY.total_seconds()
    await eventually(lambda: len(said) == 2)
    await asyncio.sleep(0.02)
    following.cancel()
    assert said == ["certificate has expired: tls_cert", "certificate has expired: tls_client_ca"]
