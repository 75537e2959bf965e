"""Where traces go, as the environment says: to a collector of OpenTelemetry's protocol, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from manyhats.server.access.errors import ConfigError

if TYPE_CHECKING:
    from manyhats.server.observability.tracing import Tracing

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def open_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """What makes and exports the spans of calls; None unless a collector's address is given, and nothing is imported.

    The exporter reads the other variables of OpenTelemetry's specification itself: headers, certificates, limits.

    Raises:
        ConfigError: the extra ``otel`` is not installed; or the collector is to be spoken to by another protocol.
    """
    setting = collector_setting(environment)
    if setting is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from manyhats.server.observability.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            setting, "traces need the extra otel: pip install 'manyhats[otel]', or unset it"
        ) from error
    return Tracing(BatchSpanProcessor(OTLPSpanExporter()), version("manyhats"))


def collector_setting(environment: Mapping[str, str]) -> str | None:
    """The variable that has the collector's address; None if no traces are to be made.

    Raises:
        ConfigError: the collector is to be spoken to by another protocol.
    """
    setting = next((name for name in ENDPOINTS if environment.get(name)), None)
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if setting is None or is_off or environment.get("OTEL_TRACES_EXPORTER", "") == "none":
        return None
    for name in _PROTOCOLS:
        if environment.get(name, "grpc") not in ("", "grpc"):
            raise ConfigError(name, f"traces are exported by grpc, not by {environment[name]}")
    return setting
