"""The HTTP port: a socket of its own, on the event loop of the calls."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from manyhats.server.access.addresses import join_host_port
from manyhats.server.access.tls import ServerTls
from manyhats.server.http.connection import Connection, ConnectionLimits
from manyhats.server.service.errors import AddressError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

BACKLOG = 1024  # connections that the system queues until they are accepted; its own limit may be lower
_KEEP_ALIVE_S = 75


class HttpPort:
    """An HTTP/1.1 server on one address.

    Args:
        app: answers requests.
        host, port: where to listen; port 0 for any free one.
        tls: encrypts; None for no TLS.
        limits: on its connections; None for the usual ones.

    Raises:
        AddressError: the address cannot be bound.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        tls: ServerTls | None = None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        try:
            self._socket = listening_socket(host, port)
        except OSError as error:
            raise AddressError("HTTP", join_host_port(host, port)) from error
        self.address = join_host_port(host, self._socket.getsockname()[1])
        self._connection: type[Connection] = type(
            "_Connection", (Connection,), {"limits": limits or ConnectionLimits()}
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=self._connection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="error",
                server_header=False,
                headers=[("server", "manyhats")],
                timeout_keep_alive=_KEEP_ALIVE_S,
                backlog=BACKLOG,
                reset_contextvars=True,
                ssl_context_factory=None if tls is None else lambda config, default: _context(tls),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def num_connections(self) -> int:
        """Those that are open."""
        return len(self._server.server_state.connections)

    @property
    def num_requests(self) -> int:
        """Requests whose answers are not complete."""
        return len(self._server.server_state.tasks)

    @property
    def num_refused(self) -> int:
        """Connections that were closed as there were too many, so far."""
        return self._connection.num_refused

    async def start(self) -> None:
        """Answer requests."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(0)

    async def stop(self, grace_s: float) -> None:
        """Accept no new requests, and cancel those still running after ``grace_s``."""
        if self._serving is None:
            self._socket.close()
            return
        state = self._server.server_state
        for listener in self._server.servers:
            listener.close()
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            _, late = await asyncio.wait(set(state.tasks), timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        for connection in list(state.connections):
            connection.transport.abort()
        self._server.should_exit = self._server.force_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """Leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _context(tls: ServerTls) -> ssl.SSLContext:
    """Presents the newest certificate at each handshake, whether or not the client names the server."""
    context = tls.current.http

    def newest(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = tls.current.http

    context.sni_callback = newest
    return context


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on an address, without blocking.

    Raises:
        OSError: the address cannot be bound.
    """
    is_v6 = ":" in host
    listener = socket.create_server(
        (host, port),
        family=socket.AF_INET6 if is_v6 else socket.AF_INET,
        backlog=BACKLOG,
        dualstack_ipv6=is_v6 and socket.has_dualstack_ipv6(),
    )
    listener.setblocking(False)
    return listener
