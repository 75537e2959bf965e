"""One connection of the HTTP port: uvicorn's protocol, with limits on heads and on silence."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_EXTENSION = "manyhats"
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on the connections of a port.

    Attributes:
        max_connections: beyond it, the oldest that is between two requests is closed.
        head_limit_s: from the first byte of a request, or the opening of the connection, to the end of its head.
        unread_limit_s: how long the writer of an answer waits for its reader. A connection is closed after twice as
            long: every route's, and after the calls that account for it.
    """

    max_connections: int = 1024
    head_limit_s: float = 10.0
    unread_limit_s: float = 60.0


class Connection(HttpToolsProtocol):
    """An HTTP/1.1 connection.

    The library bounds neither a request's head nor the time it takes to arrive, nor how long an answer is unread. A
    connection over the limit of the port closes the oldest that is between two requests: it has had its time.
    """

    limits = ConnectionLimits()
    num_refused = 0
    """Connections that were closed since there were too many; each port has a class, and so a number, of its own."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for a connection, or close it."""
        self._opened_s = time.monotonic()
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        super().connection_made(transport)
        _send_at_once(transport)
        if len(self.connections) > self.limits.max_connections:
            type(self).num_refused += 1
            if not self._close_an_idle_one():
                transport.abort()
                return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._head_arrived()
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a piece of a request, unless its head has become too long."""
        if self._is_in_head:
            if self._head_timer is None:
                self._await_head()
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large", b"the head of the request is too long")

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._num_header_bytes = 0
        self.scope["extensions"] = {_EXTENSION: {"transport": self.transport}}

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address, unless it is too long."""
        super().on_url(url)
        if len(self.url) > MAX_HEAD_BYTES:
            raise ValueError("the address is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, unless there are too many, or they are too long."""
        super().on_header(name, value)
        self._num_header_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._num_header_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")  # the parser fails

    def on_headers_complete(self) -> None:
        """The end of a head; the time for the body is the call's matter."""
        self._head_arrived()
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The end of a request; what comes now begins another's head."""
        super().on_message_complete()
        self._is_in_head, self._num_head_bytes = True, 0

    def pause_writing(self) -> None:
        """Wait for the reader, but not forever."""
        super().pause_writing()
        self._was_read()
        limit_s = 2 * self.limits.unread_limit_s
        self._unread_timer = self.loop.call_later(limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader has read."""
        self._was_read()
        super().resume_writing()

    def _was_read(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_limit_s, self.transport.abort)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(b"400 Bad Request", b"this is not an HTTP request")

    def _refuse(self, status: bytes, message: bytes) -> None:
        if not self.transport.is_closing():
            body = (
                b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}'
                % message
            )
            head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (
                status,
                len(body),
            )
            self.transport.write(head + b"connection: close\r\n\r\n" + body)
            self.transport.close()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close_an_idle_one(self) -> bool:
        others: Any = self.connections
        idle = [other for other in others if other is not self and other._is_idle]
        if idle:
            min(idle, key=lambda other: float(other._opened_s)).transport.abort()
        return bool(idle)


def _send_at_once(transport: asyncio.Transport) -> None:
    """Let small writes go out before the earlier ones are acknowledged, for which clients take up to 40 ms.

    asyncio does so for sockets that name their protocol, and those of ``socket.create_server`` do not.
    """
    connected = transport.get_extra_info("socket")
    if connected is not None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def transport_of(scope: Scope) -> asyncio.Transport | None:
    """The transport of a request's connection; None on another server."""
    transport: asyncio.Transport | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("transport")
    return transport
