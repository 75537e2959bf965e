"""How a client verifies its server, and identifies itself."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, field

import grpc

from manyhats.client.errors import CredentialsError

Path = str | os.PathLike[str]

_TOKEN = re.compile(r"[!-~]+")
_NETWORK_SCHEME = re.compile(r"(?:dns|ipv4|ipv6):(?://[^/]*/)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client presents to a server that requires more than an address.

    Attributes:
        token: sent with every call; only over TLS, or to this machine.
        tls: encrypt, and have the server prove its identity; any of the files below implies it.
        ca_file: PEM certificates of the authorities to trust; None for the public ones.
        cert_file, key_file: PEM certificate and key of the caller, if the server requires one (mutual TLS).
        allow_clear_token: send the token to another machine even without TLS: anyone listening then has it.
    """

    token: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    allow_clear_token: bool = False

    @property
    def uses_tls(self) -> bool:
        """Whether to use TLS; a file for it implies so."""
        return self.tls or any((self.ca_file, self.cert_file, self.key_file))

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """The credentials to open a secure channel with, including the token; None without TLS.

        Raises:
            CredentialsError: a file cannot be used, or the token is malformed.
        """
        if not self.uses_tls:
            return None
        key, certificate = self._pair()
        authorities = None if self.ca_file is None else _authorities(self.ca_file)
        secure = grpc.ssl_channel_credentials(authorities, key, certificate)
        token = self._checked_token()
        if token is None:
            return secure
        return grpc.composite_channel_credentials(secure, grpc.access_token_call_credentials(token))

    def clear_metadata(self, target: str) -> tuple[tuple[str, str], ...]:
        """What every call over an insecure channel to ``target`` sends.

        Raises:
            CredentialsError: the token would leave this machine unencrypted, or is malformed.
        """
        token = self._checked_token()
        if token is None:
            return ()
        if not (self.allow_clear_token or is_this_machine(target)):
            raise CredentialsError(
                f"without TLS, the token would be readable by anyone between here and {target}"
            )
        return (("authorization", f"Bearer {token}"),)

    def _checked_token(self) -> str | None:
        if not self.token:
            return None
        token = self.token.strip()
        if _TOKEN.fullmatch(token) is None:
            raise CredentialsError("a token is one word of printable ASCII characters")
        return token

    def _pair(self) -> tuple[bytes | None, bytes | None]:
        if self.cert_file is None and self.key_file is None:
            return None, None
        if self.cert_file is None or self.key_file is None:
            raise CredentialsError("a caller's certificate and its key must be given together")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                self.cert_file, self.key_file, password=_no_passphrase
            )
        except ssl.SSLError:
            text = "are not a PEM certificate and its PEM key without a passphrase"
            raise CredentialsError(f"{self.cert_file} and {self.key_file} {text}") from None
        except OSError as error:
            raise CredentialsError(
                f"cannot read {self.cert_file} or {self.key_file}: {error.strerror}"
            ) from error
        return _read(self.key_file), _read(self.cert_file)


def is_this_machine(target: str) -> bool:
    """Whether calls to a gRPC target stay on this machine; False if that is not certain."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = _NETWORK_SCHEME.sub("", target, count=1).split(",")
    return all(_is_loopback(_host(address)) for address in addresses)


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: where it leads is unknown


def _authorities(path: Path) -> bytes:
    pem = _read(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode())
    except (ssl.SSLError, ValueError):
        raise CredentialsError(f"{path} has no PEM certificates") from None
    return pem


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error.strerror}") from error


def _no_passphrase() -> str:
    """Without this, OpenSSL would prompt at the terminal; an empty passphrase opens no key."""
    return ""
