"""A port for metrics and probes alone, served by its own thread.

Its own, so that a scrape is answered while the calls' event loop is busy; nothing here waits for the engine. One
thread, with an event loop, so that silent callers cost no more than their sockets.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from io import BytesIO
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from manyhats.server.access.addresses import join_host_port
from manyhats.server.access.tls import ServerTls
from manyhats.server.http.port import listening_socket
from manyhats.server.service.errors import AddressError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


_MAX_HEAD_BYTES = 16 * 1024
_WAIT_FOR_FILES_S = 0.1


class MetricsPort:
    """An HTTP server on one address, in a background thread; each connection has one request.

    Args:
        app: answers requests, at once.
        host, port: where to listen; port 0 for any free one.
        tls: encrypts; None for no TLS.
        time_limit_s: from the connection to the last byte of the answer, whoever is slow.
        max_connections: beyond it, the oldest is closed: it has had its time, and a probe takes milliseconds.

    Raises:
        AddressError: the address cannot be bound.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        host: str,
        port: int,
        tls: ServerTls | None = None,
        time_limit_s: float = 10.0,
        max_connections: int = 256,
    ) -> None:
        try:
            self._listener = listening_socket(host, port)
        except OSError as error:
            raise AddressError("metrics", join_host_port(host, port)) from error
        self._answerer = _Answerer(app, host, self._listener.getsockname()[1])
        self._tls = tls
        self._time_limit_s = time_limit_s
        self._max_connections = max_connections
        self._connections: dict[asyncio.Task[None], None] = {}  # oldest first
        self.address = join_host_port(host, self._answerer.server_port)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Answer requests."""
        self._accepting = self._loop.create_task(self._accept())
        self._thread.start()

    def stop(self) -> None:
        """Close the port and its connections; quick, but blocks until the thread has ended."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    # On the thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, suppress(asyncio.CancelledError):
            runner.run(self._wait())

    async def _wait(self) -> None:
        await self._accepting

    async def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    connection, _ = await self._loop.sock_accept(self._listener)
                except OSError:  # no file descriptor is left, or the caller has left
                    await asyncio.sleep(_WAIT_FOR_FILES_S)
                    continue
                self._make_room()
                task = self._loop.create_task(self._serve(connection))
                self._connections[task] = None
                task.add_done_callback(lambda done: self._connections.pop(done, None))
                await asyncio.sleep(0)  # existing connections get a turn between two new ones

    def _make_room(self) -> None:
        if len(self._connections) >= self._max_connections:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()

    async def _serve(self, connection: socket.socket) -> None:
        # A caller that speaks no TLS, stops halfway, or leaves: its own problem.
        with connection, suppress(OSError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(self._time_limit_s):
                await self._answer(connection)

    async def _answer(self, connection: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=_MAX_HEAD_BYTES)
        transport, protocol = await self._loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader),
            connection,
            ssl=None if self._tls is None else self._tls.current.http,
        )
        try:
            head = await _read_head(reader)
            if head:
                writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
                writer.write(self._answerer.answer(head, transport.get_extra_info("peername")))
                writer.close()
                await writer.wait_closed()
        finally:
            transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """Read a request up to the empty line; b"" if the caller stops before it.

    Raises:
        ValueError: a line, or all of them, are too long.
    """
    head = b""
    while not head.endswith((b"\n\r\n", b"\n\n")):
        line = await reader.readline()
        head += line
        if not line.endswith(b"\n"):
            return b""
        if len(head) > _MAX_HEAD_BYTES:
            raise ValueError("the request has no end")
    return head


class _Answerer(WSGIServer):
    """The standard library's request parser and response writer, without its sockets."""

    def __init__(self, app: WSGIApplication, host: str, port: int) -> None:
        self.server_name, self.server_port = host, port
        self.setup_environ()
        self.set_app(app)

    def answer(self, head: bytes, address: Any) -> bytes:
        """The response bytes for a request's bytes."""
        request: Any = head  # instead of a socket
        return _Handler(request, address, self).answer


_SOFTWARE = "manyhats"  # no versions in the Server header


class _Response(ServerHandler):
    server_software = _SOFTWARE


class _Handler(WSGIRequestHandler):
    default_request_version = "HTTP/1.0"  # so that an unreadable request gets a response with a status

    def setup(self) -> None:
        """Read from, and write to, memory."""
        request: Any = self.request
        self.rfile = BytesIO(request)
        self.wfile = self._written = BytesIO()

    def handle(self) -> None:
        """Answer one request."""
        self.raw_requestline = self.rfile.readline()  # the head as a whole has a limit
        if self.parse_request():
            environ = self.get_environ()
            output: Any = self.wfile
            response = _Response(self.rfile, output, self.get_stderr(), environ, multithread=False)
            response.request_handler = self  # type: ignore[attr-defined]  # what it logs to
            response.run(self.server.get_app())  # type: ignore[attr-defined]

    def version_string(self) -> str:
        """The Server header of a response to an unreadable request."""
        return _SOFTWARE

    def finish(self) -> None:
        """Keep what was written."""
        self.answer: bytes = self._written.getvalue()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: probes and scrapes come every few seconds."""
