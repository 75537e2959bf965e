"""Traces: whether they can be made, and somebody takes them."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from manyhats.server.doctor.finding import Finding, ok, warning
from manyhats.server.doctor.packages import look_at_packages
from manyhats.server.lifetime.exporting import collector_setting

_PORT = 4317
"""Of OpenTelemetry's protocol over gRPC, where an address names none."""
_LIMIT_S = 2.0


def look_at_traces(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the collector that the environment names is there; nothing if it names none.

    Raises:
        ConfigError: it is to be spoken to by another protocol.
    """
    setting = collector_setting(environment)
    if setting is None:
        return
    yield from look_at_packages("otel")
    address = environment[setting]
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or _PORT), _LIMIT_S).close()
    except OSError as error:
        yield warning(
            "traces", f"nothing takes them at {parts.netloc}: {error.strerror or error}", f"see {setting}"
        )
    else:
        yield ok("traces", f"somebody listens at {parts.netloc}")
