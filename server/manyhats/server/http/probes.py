"""Endpoints for operators' programs: ``/metrics``, ``/healthz`` and ``/readyz``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import choose_encoder

from manyhats.server.service.gate import Gate, ServingState

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def make_app(gate: Gate, registry: CollectorRegistry) -> WSGIApplication:
    """The WSGI application: three paths, 404 for the rest."""
    metrics: WSGIApplication = make_wsgi_app(registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(_with_known_format(environ), start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _plain(
                environ, start_response, "405 Method Not Allowed", "use GET", ("Allow", "GET, HEAD")
            )
        if path == "/healthz":
            # The process is alive as long as this thread can answer; a dead engine ends the process anyway.
            return _plain(environ, start_response, "200 OK", "ok")
        if path == "/readyz":
            state = gate.state
            is_ready = state is ServingState.READY
            return _plain(
                environ, start_response, "200 OK" if is_ready else "503 Service Unavailable", state.value
            )
        return _plain(environ, start_response, "404 Not Found", "try /metrics, /healthz or /readyz")

    return app


def _with_known_format(environ: WSGIEnvironment) -> WSGIEnvironment:
    """A request for metrics; one whose ``Accept`` cannot be read is for plain text."""
    try:
        choose_encoder(environ.get("HTTP_ACCEPT", ""))
    except (TypeError, ValueError):  # a version that is not a number
        return {**environ, "HTTP_ACCEPT": "text/plain"}
    return environ


def _plain(
    environ: WSGIEnvironment, start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    length = ("Content-Length", str(len(body)))
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), length, *headers])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
