"""What operators' programs ask: ``/metrics``, whether the process lives, and whether it is ready.

As an ASGI application's routes on the HTTP port, and as a WSGI application on a port of their own.
"""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from anyio import to_thread
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from manyhats.server.observability.exposition import exposition
from manyhats.server.service.gate import Gate, ServingState

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

Answer = tuple[int, str]
"""Status and text."""

_PHRASES: Mapping[int, str] = MappingProxyType(
    {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
)


def is_alive(gate: Gate) -> Answer:
    """The process is alive as long as it can answer; a dead engine ends the process anyway."""
    return 200, "ok"


def is_ready(gate: Gate) -> Answer:
    """Whether a request would be served, and the server's state."""
    state = gate.state
    return 200 if state is ServingState.READY else 503, state.value


def is_store_whole(gate: Gate) -> Answer:
    """Whether the store can be used for everything, and else what for it cannot, and why."""
    if gate.is_store_whole:
        return 200, "ok"
    problems = gate.store_problems
    return 503, "\n".join(f"{use.value}: {problem}" for use, problem in problems.items()) or "loading"


PROBES: Mapping[str, Callable[[Gate], Answer]] = MappingProxyType(
    {
        "/healthz": is_alive,
        "/readyz": is_ready,
        "/storez": is_store_whole,
        # The names that load generators and others' probes know.
        "/health": is_ready,
        "/ping": is_alive,
        "/v2/health/live": is_alive,
        "/v2/health/ready": is_ready,
    }
)


@dataclass(frozen=True, slots=True)
class Scrape:
    """A request for metrics.

    Attributes:
        accept, accept_encoding: its headers; "" if it has none.
        names: of the series wanted, the query's ``name[]``; none for all.
    """

    accept: str = ""
    accept_encoding: str = ""
    names: Sequence[str] = ()

    def answer(self, registry: CollectorRegistry) -> tuple[dict[str, str], bytes]:
        """Headers and body; takes milliseconds in proportion to the number of series."""
        wanted: Any = registry.restricted_registry(self.names) if self.names else registry
        content_type, body = exposition(wanted, self.accept)
        headers = {"Content-Type": content_type}
        if "gzip" in self.accept_encoding:
            body, headers["Content-Encoding"] = gzip.compress(body, compresslevel=1), "gzip"
        return headers, body


def routes(gate: Gate, registry: CollectorRegistry) -> list[Route]:
    """The routes of the HTTP port."""

    async def metrics(request: Request) -> Response:
        heads = request.headers
        scrape = Scrape(
            ",".join(heads.getlist("accept")),
            ",".join(heads.getlist("accept-encoding")),
            request.query_params.getlist("name[]"),
        )
        headers, body = await to_thread.run_sync(scrape.answer, registry)
        return Response(body, headers=headers)

    async def show_version(request: Request) -> Response:
        return JSONResponse({"version": version("manyhats")})

    def probe(ask: Callable[[Gate], Answer]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            status, text = ask(gate)
            return PlainTextResponse(f"{text}\n", status)

        return answer

    return [
        Route("/metrics", metrics),
        Route("/version", show_version),
        *(Route(path, probe(ask)) for path, ask in PROBES.items()),
    ]


def make_metrics_app(gate: Gate, registry: CollectorRegistry) -> WSGIApplication:
    """The application of a port for metrics and probes alone."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, body, headers["Allow"] = 405, b"use GET\n", "GET, HEAD"
        elif path == "/metrics":
            status = 200
            given = parse_qs(environ.get("QUERY_STRING", ""))
            accept, encoding = environ.get("HTTP_ACCEPT", ""), environ.get("HTTP_ACCEPT_ENCODING", "")
            headers, body = Scrape(accept, encoding, given.get("name[]", ())).answer(registry)
        elif path in PROBES:
            status, text = PROBES[path](gate)
            body = f"{text}\n".encode()
        else:
            status, body = 404, b"try /metrics, /healthz or /readyz\n"
        headers["Content-Length"] = str(len(body))
        start_response(f"{status} {_PHRASES[status]}", list(headers.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app
