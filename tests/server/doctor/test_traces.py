"""What the doctor says of traces, by the variables of OpenTelemetry."""

from __future__ import annotations

import socket

import pytest

from manyhats.server.access.errors import ConfigError
from manyhats.server.doctor.packages import look_at_packages
from manyhats.server.doctor.traces import look_at_traces
from support.harnesses.doctor import conditions


def test_without_a_collector_nothing_is_said() -> None:
    assert list(look_at_traces({})) == []
    off = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}
    assert list(look_at_traces(off)) == []


def test_a_collector_that_is_there_or_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector:
        address = f"127.0.0.1:{collector.getsockname()[1]}"
        found = list(look_at_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}"}))
        assert conditions(found) == [*conditions(look_at_packages("otel")), ("traces", "ok")]
        found = list(look_at_traces({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": address}))
        assert conditions(found)[1] == ("traces", "ok")
    found = list(look_at_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}"}))
    assert conditions(found)[1] == ("traces", "warning")
    assert address in found[1].text
    assert found[1].advice == "see OTEL_EXPORTER_OTLP_ENDPOINT"


def test_another_protocol_is_refused_as_by_serve() -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL"):
        list(
            look_at_traces(
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
            )
        )
