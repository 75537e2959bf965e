"""A source on a web server: never a redirect, never an address inside the operator's network.

The host's name is resolved once, all its addresses are checked, and the connection goes to the address that was
checked: a later, different answer from the name server has no effect.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Generator, Iterator, Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from manyhats.adapters.errors import (
    SourceNotAllowedError,
    SourceUnavailableError,
)
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.artifact_files import FILES
from manyhats.adapters.formats.peft import format as peft_format

Resolve = Callable[[str, int], list[str]]

_TIMEOUT_S = 20.0
_CHUNK_BYTES = 1024 * 1024
_HEADERS: Mapping[str, str] = MappingProxyType({"Accept-Encoding": "identity", "User-Agent": "manyhats"})
_ABSENT = (404, 410)
_FORBIDDEN = (401, 403)
# Addresses that embed an IPv4 address: they do not say where they lead.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
# A web server cannot list files: these are requested one by one.
_NAMES = (
    *FILES,
    *peft_format.PICKLES,
    *adapterhub_format.COMPANIONS,
    adapterhub_format.HEAD_PICKLE_FILE,
)


def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a host, as the name server gives them now."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class HttpDirectory:
    """The files under a URL.

    Args:
        uri: ``https://…`` or ``http://…``, without query; checked by the caller.
        resolve: gives the addresses of a host.
        may_connect: whether an address may be connected to.

    Raises:
        SourceNotAllowedError: the host has an address that may not be connected to.
        SourceUnavailableError: the host is unknown or cannot be reached.
    """

    def __init__(
        self, uri: str, *, resolve: Resolve = resolve_host, may_connect: Callable[[str], bool] = is_public
    ) -> None:
        self._uri = uri
        parts = urlsplit(uri)
        self._path = parts.path.rstrip("/")
        self._is_secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._is_secure else 80)
        self._address = self._pin(resolve, may_connect)

    def sizes(self) -> Mapping[str, int]:
        """Those files of an adapter that exist."""
        found = ((name, self._size(name)) for name in _NAMES)
        return {name: size for name, size in found if size is not None}

    def read(self, name: str, size_bytes: int) -> Generator[bytes, None, None]:
        """A file, as it comes."""
        with self._answer("GET", name) as answer:
            self._require_ok(answer, name)
            taken = 0
            while taken <= size_bytes and (piece := answer.read1(_CHUNK_BYTES)):
                taken += len(piece)
                yield piece

    def _size(self, name: str) -> int | None:
        with self._answer("HEAD", name) as answer:
            if answer.status in _ABSENT:
                return None
            self._require_ok(answer, name)
            length = answer.getheader("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise SourceNotAllowedError(self._uri, f"does not say how large '{name}' is")
        return int(length)

    def _require_ok(self, answer: http.client.HTTPResponse, name: str) -> None:
        if 300 <= answer.status < 400:
            raise SourceNotAllowedError(
                self._uri, f"answers '{name}' with a redirect, which is never followed"
            )
        if answer.status in _FORBIDDEN:
            raise SourceNotAllowedError(self._uri, f"denies the server access to '{name}'")
        if answer.status != http.client.OK:
            raise SourceUnavailableError(self._uri, f"answers '{name}' with status {answer.status}")
        if answer.getheader("Content-Encoding", "identity") != "identity":
            raise SourceNotAllowedError(self._uri, f"sends '{name}' compressed")

    @contextlib.contextmanager
    def _answer(self, method: str, name: str) -> Iterator[http.client.HTTPResponse]:
        connection = _PinnedConnection(self._host, self._port, self._address, is_secure=self._is_secure)
        try:
            connection.request(method, f"{self._path}/{name}", headers=dict(_HEADERS))
            with connection.getresponse() as answer:
                yield answer
        except (OSError, http.client.HTTPException) as error:
            raise SourceUnavailableError(self._uri, f"cannot be read now ({type(error).__name__})") from error
        finally:
            connection.close()

    def _pin(self, resolve: Resolve, may_connect: Callable[[str], bool]) -> str:
        try:
            addresses = resolve(self._host, self._port)
        except (OSError, UnicodeError) as error:
            raise SourceUnavailableError(self._uri, "its host is unknown") from error
        if not addresses:
            raise SourceUnavailableError(self._uri, "its host is unknown")
        if not all(map(may_connect, addresses)):
            raise SourceNotAllowedError(
                self._uri, "its host has an address that is not on the public internet"
            )
        return addresses[0]


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to one address; the host's name is used only for the request and the certificate."""

    def __init__(self, host: str, port: int, address: str, *, is_secure: bool) -> None:
        super().__init__(host, port, timeout=_TIMEOUT_S)
        self._address = address
        self._is_secure = is_secure
        self.default_port = 443 if is_secure else 80

    def connect(self) -> None:
        """Connect to the pinned address."""
        plain = socket.create_connection((self._address, self.port), _TIMEOUT_S)
        if not self._is_secure:
            self.sock = plain
            return
        try:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise
