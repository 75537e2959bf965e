"""Connections without number, and those that say nothing or little: both ports go on answering."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from manyhats.server.grpc.port import GrpcLimits, GrpcPort
from manyhats.server.http.metrics_port import MetricsPort
from manyhats.server.http.probes import make_metrics_app
from manyhats.server.lifetime.system import connection_limits
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate
from manyhats.v1 import generation_pb2 as pb
from manyhats.v1 import server_pb2
from manyhats.v1.server_pb2_grpc import ServerServiceStub
from support.fakes.server import Running, running_server

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for both ends of the connections of a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def said(client: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    answer = b""
    try:
        while data := client.recv(4096):
            answer += data
    except ConnectionResetError:
        pass
    return answer


@contextmanager
def http_port(**limits: float) -> Iterator[MetricsPort]:
    gate, metrics = Gate(heartbeat_limit_s=1), Metrics(max_task_labels=1)
    port = MetricsPort(make_metrics_app(gate, metrics.registry), host="127.0.0.1", port=0, **limits)  # type: ignore[arg-type]
    port.start()
    try:
        yield port
    finally:
        port.stop()


async def assert_answers(server: Running) -> None:
    await server.generation.Generate(pb.GenerateRequest(text="a"), timeout=5)
    assert await asyncio.to_thread(get, server.http, "/readyz") == "ready\n"
    assert "manyhats_requests_total" in await asyncio.to_thread(get, server.http, "/metrics")


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(
    ("port", "words"), [("http", b""), ("http", b"GET /metr"), ("grpc", b""), ("grpc", PREFACE)]
)
async def test_both_ports_answer_beside_1100_connections_that_ask_nothing(port: str, words: bytes) -> None:
    async with running_server() as server:
        address = server.http if port == "http" else server.port.address
        num_threads = threading.active_count()
        with ExitStack() as stack:
            for _ in range(1100):
                client = stack.enter_context(await asyncio.to_thread(connected, address))
                client.sendall(words)
            await assert_answers(server)
            assert threading.active_count() <= num_threads + 8  # the event loop's own, for these tests


async def test_a_burst_of_probes_is_answered_whole() -> None:
    async with running_server() as server:
        requests = [asyncio.to_thread(get, server.http, "/healthz") for _ in range(300)]
        assert set(await asyncio.gather(*requests)) == {"ok\n"}


def test_the_oldest_connection_makes_room_for_a_new_one() -> None:
    with http_port(max_connections=4) as port, ExitStack() as stack:
        clients = [stack.enter_context(connected(port.address)) for _ in range(8)]
        assert [said(client) for client in clients[:4]] == [b""] * 4
        assert get(port.address, "/healthz") == "ok\n"
        clients[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert said(clients[-1]).endswith(b"ok\n")


@pytest.mark.parametrize("head", [b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 10_000, b"G", b"\x16\x03\x01"])
def test_a_request_that_drips_is_cut_off(head: bytes) -> None:
    with http_port(time_limit_s=0.3) as port, connected(port.address) as client:
        client.settimeout(0.02)
        end_s = time.monotonic() + 30
        for byte in head:
            try:
                client.sendall(bytes([byte]))
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                assert time.monotonic() < end_s
            except OSError:
                break
        client.settimeout(5)
        assert said(client) == b""


@pytest.mark.parametrize(
    ("request_bytes", "first_line"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"HTTP/1.0 200 OK"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", b"HTTP/1.0 200 OK"),
        (b"GET /healthz HTTP/1.0\n\n", b"HTTP/1.0 200 OK"),
        (b"GET /healthz?a=b HTTP/1.0\r\n\r\n", b"HTTP/1.0 200 OK"),
        (b"GET /healthz/ HTTP/1.0\r\n\r\n", b"HTTP/1.0 404 Not Found"),
        (b"PUT /healthz HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc", b"HTTP/1.0 405 Method Not Allowed"),
        (b"OPTIONS * HTTP/1.0\r\n\r\n", b"HTTP/1.0 405 Method Not Allowed"),
        (b"GET HTTP/1.0\r\n\r\n", b"HTTP/1.0 404"),
        (b"GET / HTTP/9.9\r\n\r\n", b"HTTP/1.0 505"),
        (b"a b c d\r\n\r\n", b"HTTP/1.0 400"),
        (b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"HTTP/1.0 431"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.0\r\n\r\n", b""),
        (b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", b""),
        (b"\r\n\r\n", b""),
        (b"\n\n", b""),
        (b"\0" * 100 + b"\n\n", b""),
        (b"\xff\xfe HTTP \n\n", b""),
    ],
)
def test_whatever_is_asked_is_answered_or_closed_and_the_port_goes_on(
    request_bytes: bytes, first_line: bytes
) -> None:
    with http_port(time_limit_s=5) as port:
        with connected(port.address) as client:
            client.sendall(request_bytes)
            client.shutdown(socket.SHUT_WR)
            answer = said(client)
        assert answer.startswith(first_line)
        assert get(port.address, "/healthz") == "ok\n"


@pytest.mark.parametrize(
    "line", [b"GET /healthz", b"GET /metrics", b"GET /nothing", b"PUT /readyz", b"HEAD /healthz", b"a b c d"]
)
@pytest.mark.parametrize("version", [b" HTTP/1.0", b" HTTP/1.1", b" HTTP/9.9", b""])
def test_no_answer_names_versions_of_what_made_it(line: bytes, version: bytes) -> None:
    with http_port() as port, connected(port.address) as client:
        client.sendall(line + version + b"\r\n\r\n")
        answer = said(client)
    for name in (b"Python", b"WSGI", sys.version.split()[0].encode()):
        assert name not in answer
    assert (b"\r\nServer: manyhats\r\n" in answer) == answer.startswith(b"HTTP/")


def test_the_port_stops_while_callers_are_connected() -> None:
    with ExitStack() as stack:
        with http_port() as port:
            clients = [stack.enter_context(connected(port.address)) for _ in range(20)]
            clients[0].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert said(clients[0])
        assert [said(client) for client in clients[1:]] == [b""] * 19
        with pytest.raises(ConnectionError):
            connected(port.address)


async def test_grpc_connections_over_the_limit_are_closed_and_the_others_served() -> None:
    gate, metrics = Gate(heartbeat_limit_s=1), Metrics(max_task_labels=1)
    port = GrpcPort(Calls(gate, metrics), host="127.0.0.1", port=0, limits=GrpcLimits(max_connections=4))
    await port.start()
    try:
        async with grpc.aio.insecure_channel(port.address) as channel:
            stub = ServerServiceStub(channel)
            call = stub.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert await call.code() is grpc.StatusCode.UNAVAILABLE  # loading: answered
            with ExitStack() as stack:
                clients = [stack.enter_context(connected(port.address)) for _ in range(8)]
                assert await asyncio.to_thread(said, clients[-1]) == b""
                again = stub.GetServerInfo(server_pb2.GetServerInfoRequest())
                assert "being loaded" in str(await again.details())
    finally:
        await port.stop(0.0)


def test_the_file_limit_is_raised_as_far_as_it_may_be() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000));"
        "from manyhats.server.lifetime.system import raise_file_limit;"
        "print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE), raise_file_limit())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed.splitlines()[-1] == "1000 1000 1000 1000"


@pytest.mark.parametrize("file_limit", [256, 1024, 4096, 65_536])
def test_connections_leave_files_for_everything_else(file_limit: int) -> None:
    limits = connection_limits(file_limit)
    assert 0 < limits.http < limits.grpc
    assert limits.http + limits.grpc <= 0.7 * file_limit
