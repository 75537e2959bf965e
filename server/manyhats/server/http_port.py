"""The HTTP port: ``/metrics``, ``/healthz`` and ``/readyz``, served by threads of their own.

Threads, so that a scrape is answered while the event loop is busy; nothing here waits for the engine.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from manyhats.server.errors import AddressError
from manyhats.server.gate import Gate, ServingState
from manyhats.server.grpc_port import join_host_port
from manyhats.server.tls import ServerTls

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def make_app(gate: Gate, registry: CollectorRegistry) -> WSGIApplication:
    """The WSGI application: three paths, 404 for the rest."""
    metrics: WSGIApplication = make_wsgi_app(registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _plain(
                environ, start_response, "405 Method Not Allowed", "use GET", ("Allow", "GET, HEAD")
            )
        if path == "/healthz":
            # The process lives as long as this thread can answer; a dead engine ends the process by itself.
            return _plain(environ, start_response, "200 OK", "ok")
        if path == "/readyz":
            state = gate.state
            is_ready = state is ServingState.READY
            return _plain(
                environ, start_response, "200 OK" if is_ready else "503 Service Unavailable", state.value
            )
        return _plain(environ, start_response, "404 Not Found", "try /metrics, /healthz or /readyz")

    return app


def _plain(
    environ: WSGIEnvironment, start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    length = ("Content-Length", str(len(body)))
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), length, *headers])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class HttpPort:
    """An HTTP server on one address, in background threads.

    Args:
        app: answers requests.
        host, port: where to listen; port 0 takes any free one.
        tls: encrypts; None serves in the clear.

    Raises:
        AddressError: the address cannot be bound.
    """

    def __init__(self, app: WSGIApplication, *, host: str, port: int, tls: ServerTls | None = None) -> None:
        server_class = _ServerV6 if ":" in host else _Server
        try:
            self._server = server_class((host, port), _Handler)
        except OSError as error:
            raise AddressError("HTTP", join_host_port(host, port)) from error
        self._server.set_app(app)
        self._server.tls = tls
        self.address = join_host_port(host, self._server.server_port)
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)

    def start(self) -> None:
        """Answer requests."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port; quick, but it blocks until the accepting thread has ended."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """One thread per request, none of which holds up the end of the process."""

    daemon_threads = True
    tls: ServerTls | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one connection, in its own thread: a slow handshake holds up nobody else."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_Handler.timeout)
        # A caller that speaks no TLS, or goes away: its own affair.
        with suppress(OSError), self.tls.http_context().wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)

    def server_bind(self) -> None:
        """Bind without the reverse name lookup of the standard library, which can take seconds."""
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds; a client that sends nothing does not keep its thread

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: probes and scrapes come every few seconds."""
