"""Health, reflection and the HTTP port."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from manyhats.server.grpc.port import SERVICES, GrpcPort
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.http.port import HttpPort
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.call import Calls
from manyhats.server.service.errors import AddressError
from manyhats.server.service.gate import Gate, ServingState
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, make_backend, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def _health(server: Running, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(server.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def _http(server: Running, path: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{server.http}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode().strip()

    return await asyncio.to_thread(get)


async def test_health_is_the_same_for_the_server_and_each_service() -> None:
    async with running_server() as server:
        for service in ("", *SERVICES):
            assert await _health(server, service) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _health(server, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_and_readyz_follow_loading_heartbeat_draining_and_death() -> None:
    async with running_server(is_open=False) as server:
        gate, health = server.gate, server.port.health
        assert (await _health(server), await _http(server, "/readyz")) == (NOT_SERVING, (503, "loading"))
        gate.open(make_backend(server.engine, server.store))
        await health.publish()
        assert (await _health(server), await _http(server, "/readyz")) == (SERVING, (200, "ready"))
        server.engine.silent_s = 1000.0
        await health.publish()
        assert (await _health(server), await _http(server, "/readyz")) == (NOT_SERVING, (503, "stalled"))
        assert await _http(server, "/healthz") == (200, "ok")
        server.engine.silent_s = 0.2
        await health.publish()
        assert (await _health(server), await _http(server, "/readyz")) == (SERVING, (200, "ready"))
        server.engine.is_alive = False
        await health.publish()
        assert (await _health(server), await _http(server, "/readyz")) == (NOT_SERVING, (503, "dead"))
        gate.drain()
        assert await _http(server, "/readyz") == (503, "draining")
        assert await _http(server, "/healthz") == (200, "ok")


async def test_follower_publishes_changes_to_watchers_and_ends_with_the_engine() -> None:
    async with running_server(is_open=False) as server:
        stub: Any = health_pb2_grpc.HealthStub(server.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        seen = [(await watch.read()).status]
        following = asyncio.create_task(server.port.health.follow_until_dead())
        server.gate.open(make_backend(server.engine, server.store))
        seen.append((await watch.read()).status)
        server.engine.is_alive = False
        seen.append((await watch.read()).status)
        await asyncio.wait_for(following, 5)
        watch.cancel()
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]


async def test_a_state_is_logged_once_however_often_it_is_published() -> None:
    with capture_logs() as logs:
        async with running_server() as server:
            health = server.port.health
            await health.publish()
            server.engine.is_alive = False
            await asyncio.wait_for(health.follow_until_dead(), 5)
    assert [each["state"] for each in logs if each["event"] == "state"] == ["ready", "dead"]


async def test_stalled_engine_still_admits() -> None:
    async with running_server() as server:
        server.engine.silent_s = 1000.0
        assert server.gate.state is ServingState.STALLED
        assert (await server.generation.Generate(pb.GenerateRequest(text="a"))).text == "a"


async def test_reflection_lists_every_service() -> None:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with running_server() as server:
        channel: Any = server.channel
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = [answer async for answer in stub.ServerReflectionInfo(ask())]
    assert {service.name for service in answer.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "manyhats.v1.AdapterService",
        "manyhats.v1.EncodingService",
        "manyhats.v1.GenerationService",
        "manyhats.v1.ServerService",
    }


async def test_other_paths_and_methods_are_refused() -> None:
    async with running_server() as server:
        assert (await _http(server, "/other"))[0] == 404
        assert (await _http(server, "/metrics/x"))[0] == 404
        request = urllib.request.Request(f"http://{server.http}/healthz", data=b"x", method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            await asyncio.to_thread(urllib.request.urlopen, request, timeout=5)
        with caught.value as error:
            assert error.code == 405
        head = urllib.request.Request(f"http://{server.http}/healthz", method="HEAD")
        with await asyncio.to_thread(urllib.request.urlopen, head, timeout=5) as answer:
            assert (answer.status, answer.read()) == (200, b"")


async def test_taken_ports_are_one_clear_error() -> None:
    gate, metrics = Gate(heartbeat_limit_s=1), Metrics(max_task_labels=1)
    around = Surroundings(calls=Calls(gate, metrics), answers=Answers(unread_limit_s=1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"127.0.0.1:{port}"):
            HttpPort(make_app(around), host="127.0.0.1", port=port)
        with pytest.raises(AddressError, match=f"127.0.0.1:{port}"):
            GrpcPort(Calls(gate, metrics), host="127.0.0.1", port=port)


async def test_second_server_does_not_share_the_port() -> None:
    async with running_server() as server:
        port = int(server.port.address.rpartition(":")[2])
        with pytest.raises(AddressError):
            GrpcPort(Calls(server.gate, server.metrics), host="127.0.0.1", port=port)
