"""Where traces go: to a collector if its address is in the environment, else nowhere, at no cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.exporting import open_tracing
from manyhats.v1 import generation_pb2 as pb
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.servers.collector import running_collector

CHILD = """
import asyncio, sys
from pathlib import Path
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.process import serve
from support.fakes.server import EchoEngine, MemoryStore, make_backend

config = ServeConfig(model="echo", store=Path("/nowhere"), grpc_port=0, http_port=0, log_format="json")
backend = make_backend(EchoEngine(), MemoryStore())
code = asyncio.run(serve(config, assemble=lambda config, metrics, progress: backend))
print("imported" if "opentelemetry" in sys.modules else "not imported")
sys.exit(code)
"""
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
SECRET = "the quick brown fox"


@contextmanager
def child(**environment: str) -> Iterator[tuple[subprocess.Popen[str], GenerationServiceStub]]:
    """A server process, and what calls it."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    given = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    given |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=pipe, stderr=pipe, text=True, env=given
    ) as process:
        try:
            assert process.stdout is not None
            with grpc.insecure_channel(json.loads(process.stdout.readline())["grpc"]) as channel:
                yield process, GenerationServiceStub(channel)
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Output and log of a process that is asked to end, and ends well."""
    process.send_signal(signal.SIGTERM)
    output, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    return output, log


def test_spans_reach_a_collector_before_the_process_ends() -> None:
    names = {"OTEL_SERVICE_NAME": "hats", "OTEL_RESOURCE_ATTRIBUTES": "site=here"}
    with (
        running_collector() as collector,
        child(**{ENDPOINT: collector.address}, **names) as (process, generation),
    ):
        request = pb.GenerateRequest(text=SECRET)
        request.sampling.seed = 2**64 - 1  # which would not fit in a message
        generation.Generate(request)
        output, log = end(process)
    (exported,) = collector.requests
    (resource,) = exported.resource_spans
    told = {each.key: each.value.string_value for each in resource.resource.attributes}
    (span,) = resource.scope_spans[0].spans
    assert output == "imported\n"
    assert (told["service.name"], told["site"]) == ("hats", "here")
    assert span.name == "text_completion echo"
    assert f'"trace_id": "{span.trace_id.hex()}"' in log
    assert SECRET not in str(exported)
    assert SECRET not in log


def test_without_an_address_nothing_is_imported() -> None:
    with child(**{ENDPOINT: ""}) as (process, generation):
        generation.Generate(pb.GenerateRequest(text="a"))
        output, log = end(process)
    assert output == "not imported\n"
    assert "trace_id" not in log


def test_a_collector_that_is_away_holds_up_neither_calls_nor_the_end() -> None:
    with child(**{ENDPOINT: "http://127.0.0.1:9"}) as (process, generation):
        for _ in range(20):
            generation.Generate(pb.GenerateRequest(text="a"), timeout=5)
        began_s = time.monotonic()
        end(process)
    assert time.monotonic() - began_s < 10


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [each for each in os.environ if each.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "True"},
        {ENDPOINT: "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SERVICE_NAME": "hats"},
    ],
)
def test_what_turns_tracing_off(environment: dict[str, str]) -> None:
    assert open_tracing(environment) is None


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ENDPOINT])
def test_either_address_turns_it_on(name: str, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv(name, "http://127.0.0.1:9")
    tracing = open_tracing()
    assert tracing is not None
    tracing.close()


def test_an_address_without_the_extra_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=rf"{ENDPOINT}: .*pip install 'manyhats\[otel\]'"):
        open_tracing({ENDPOINT: "http://127.0.0.1:9"})


def test_another_protocol_is_refused_by_name() -> None:
    environment = {ENDPOINT: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL: .*by grpc"):
        open_tracing(environment)
