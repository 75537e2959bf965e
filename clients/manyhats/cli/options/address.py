"""Server addresses from users: what is wrong with one, and what listens at one where no server answered."""

from __future__ import annotations

import re
import socket
import ssl
from contextlib import suppress
from enum import Enum

from manyhats.cli.terminal.failures import UsageError

# Schemes of gRPC's own name resolution; the rest of such a target is for gRPC to judge.
_TARGET = re.compile(r"(unix|unix-abstract|dns|ipv4|ipv6|vsock|xds|passthrough):\S+")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:[^/@\s]*@)?([^/?#\s]*)")
_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^\s:/?#@\[\]]+):([0-9]{1,5})", re.ASCII)
_LIMIT_S = 1.0
_GREETING = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def check_address(flag: str, text: str) -> str:
    """Return an address if gRPC accepts it.

    Raises:
        UsageError: it cannot; says what to write.
    """
    if _TARGET.fullmatch(text):
        return text
    if url := _URL.match(text):
        raise UsageError(f"{flag} must be HOST:PORT, without {url[1]}://{_for_example(url[2])}, not {text!r}")
    match = _HOST_PORT.fullmatch(text)
    if match is None:
        raise UsageError(f"{flag} must be HOST:PORT{_hint(text)}, not {text!r}")
    if not 1 <= int(match[1]) <= 65535:
        raise UsageError(f"{flag} must be HOST:PORT with a port from 1 to 65535, not {text!r}")
    return text


def _hint(text: str) -> str:
    host, slash, _ = text.partition("/")
    if slash and _HOST_PORT.fullmatch(host):
        return f" without a path{_for_example(host)}"
    if text.count(":") > 1 and "[" not in text:
        address, _, port = text.rpartition(":")
        return f"; an IPv6 address goes in brackets, as in [{address}]:{port}"
    if re.fullmatch(r"[^\s:/?#@]+", text):
        return f", as in {text}:50051"
    return ""


def _for_example(host: str) -> str:
    return f", as in {host}" if _HOST_PORT.fullmatch(host) else ""


class Listener(Enum):
    """What answers at an address."""

    HTTP = "HTTP"
    HTTPS = "HTTPS"
    GRPC = "gRPC"
    GRPC_TLS = "gRPC over TLS"


def what_listens(target: str) -> Listener | None:
    """Probe an address that no gRPC call got through to; None if nothing known answers."""
    match = _HOST_PORT.fullmatch(target)
    if match is None:
        return None
    host, port = target[: match.start(1) - 1].strip("[]"), int(match[1])
    with suppress(OSError):
        first = _first_bytes(host, port)
        if first.startswith(b"HTTP/"):
            return Listener.HTTP
        if first[3:4] == b"\x04":  # an HTTP/2 SETTINGS frame
            return Listener.GRPC
        return _by_handshake(host, port)
    return None


def _first_bytes(host: str, port: int) -> bytes:
    """The beginning of its answer to an HTTP request; empty if it hangs up or stays silent."""
    with socket.create_connection((host, port), _LIMIT_S) as connection:
        try:
            connection.sendall(_GREETING)
            return connection.recv(16)
        except (TimeoutError, ConnectionError):
            return b""


def _by_handshake(host: str, port: int) -> Listener | None:
    """Whether it speaks TLS; nothing secret is sent, so whose certificate it is does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), _LIMIT_S) as connection:
        try:
            with context.wrap_socket(connection) as encrypted:
                return Listener.GRPC_TLS if encrypted.selected_alpn_protocol() == "h2" else Listener.HTTPS
        except ssl.SSLError:
            return None


def explain(target: str, uses_tls: bool) -> str | None:
    """Why a call did not get through to what listens there; None if unknown."""
    match what_listens(target):
        case Listener.HTTP | Listener.HTTPS:
            return f"{target} is an HTTP port, as a server's --http-port: --server takes its gRPC port (--grpc-port)"
        case Listener.GRPC_TLS if not uses_tls:
            return (
                f"the server at {target} speaks TLS: add --tls, or --tls-ca FILE for an authority of your own"
            )
        case Listener.GRPC if uses_tls:
            return f"the server at {target} does not speak TLS: leave out --tls, --tls-ca, --tls-cert and --tls-key"
        case _:
            return None
