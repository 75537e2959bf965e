"""What the doctor says of addresses, connections and the event loop."""

from __future__ import annotations

import resource
import socket

import pytest

from manyhats.server.doctor.ports import look_at_event_loop, look_at_files, look_at_ports
from support.harnesses.doctor import Make, bad, conditions


def test_free_ports_are_ok_and_free_afterwards(make: Make) -> None:
    config = make(grpc_port=0, http_port=0, metrics_port=0)
    expected = [("gRPC port", "ok"), ("HTTP port", "ok"), ("metrics port", "ok")]
    assert conditions(look_at_ports(config)) == expected
    assert conditions(look_at_ports(make(grpc_port=0, http_port=0))) == expected[:2]


def test_a_port_that_is_taken_fails(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (finding,) = bad(look_at_ports(make(grpc_port=0, http_port=port)))
    assert (finding.subject, finding.condition.value) == ("HTTP port", "failure")
    assert f"127.0.0.1:{port}" in finding.text
    assert "--http-port" in finding.advice
    assert bad(look_at_ports(make(grpc_port=0, http_port=port))) == []


def test_an_address_of_another_machine_fails(make: Make) -> None:
    findings = bad(look_at_ports(make(host="192.0.2.1", insecure=True, grpc_port=0, http_port=0)))
    assert [each.condition.value for each in findings] == ["failure", "failure"]
    assert "--host" in findings[0].advice


def test_few_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert conditions(look_at_files()) == [("open files", "ok" if before[1] >= 4096 else "warning")]
    # The hard limit cannot be raised again, except by root: the system's call alone is replaced.
    monkeypatch.setattr(resource, "getrlimit", lambda which: (512, 512))
    assert conditions(look_at_files()) == [("open files", "warning")]


def test_the_event_loop_is_named() -> None:
    (finding,) = look_at_event_loop()
    assert (finding.condition.value, finding.text.startswith("asyncio on ")) == ("ok", True)
