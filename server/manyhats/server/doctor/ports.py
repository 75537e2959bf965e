"""Addresses, the event loop that will answer on them, and how many connections it may have."""

from __future__ import annotations

import errno
import selectors
from collections.abc import Iterator

from manyhats.server.access.addresses import join_host_port
from manyhats.server.doctor.finding import Finding, failure, ok, warning
from manyhats.server.http.port import listening_socket
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.system import connection_limits, raise_file_limit
from manyhats.server.observability.timed_loop import TimedLoop

_FEW_FILES = 4096


def look_at_ports(config: ServeConfig) -> Iterator[Finding]:
    """Whether each port is free, by listening on it for a moment."""
    ports = {"gRPC": config.grpc_port, "HTTP": config.http_port, "metrics": config.metrics_port}
    for purpose, port in ports.items():
        if port is None:
            continue
        subject, address = f"{purpose} port", join_host_port(config.host, port)
        try:
            listening_socket(config.host, port).close()
        except OSError as error:
            yield failure(
                subject, f"{address}: {error.strerror}", _advice(error, f"--{purpose.lower()}-port")
            )
        else:
            yield ok(subject, f"any free one of {config.host}" if port == 0 else f"{address} is free")


def _advice(error: OSError, flag: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"end what listens there, or give another {flag}; --server looks at a running server instead"
            )
        case errno.EACCES:
            return f"give a {flag} from 1024 on, or let this user bind lower ones"
    return "see --host: it must be an address of this machine"


def look_at_event_loop() -> Iterator[Finding]:
    """Which event loop answers."""
    TimedLoop().close()
    kind = selectors.DefaultSelector.__name__.removesuffix("Selector").lower()
    if kind == "select":
        yield warning(
            "event loop", "asyncio on select, for at most 1,024 connections", "use Linux, macOS or BSD"
        )
    else:
        yield ok("event loop", f"asyncio on {kind}")


def look_at_files() -> Iterator[Finding]:
    """How many connections the limit on open files leaves."""
    limit = raise_file_limit()
    connections = connection_limits(limit)
    text = f"{limit}, for {connections.grpc} gRPC and {connections.http} HTTP connections"
    if limit < _FEW_FILES:
        yield warning("open files", text, "raise the hard limit: ulimit -Hn, LimitNOFILE= of systemd")
    else:
        yield ok("open files", text)
