"""What is counted and shown of the ports: their files and connections."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry

from manyhats.server.access.tokens import Role, TokenFile, new_token, token_entry
from manyhats.server.http.connection import ConnectionLimits
from manyhats.server.http.port import HttpPort
from manyhats.server.observability.ports import PortMetrics
from support.fakes.server import eventually, running_server


async def test_a_token_file_that_cannot_be_read_any_more_shows(tmp_path: Path) -> None:
    file, good = tmp_path / "tokens.yaml", token_entry("ci", new_token(), [Role.GENERATE])
    file.write_text(good)
    async with running_server(tokens=TokenFile(file)) as server:

        def unreadable() -> float | None:
            return server.metrics.registry.get_sample_value("manyhats_files_unreadable", {"files": "tokens"})

        assert unreadable() == 0
        file.write_text("nonsense: [")
        assert unreadable() == 1
        assert unreadable() == 1
        file.write_text(good)
        assert unreadable() == 0
        file.unlink()
        assert unreadable() == 1


async def hold(scope: object, receive: object, send: object) -> None:
    """An application that never answers."""
    await asyncio.Event().wait()


async def test_connections_requests_and_refusals_of_the_http_port_are_counted() -> None:
    port = HttpPort(hold, host="127.0.0.1", port=0, limits=ConnectionLimits(max_connections=2))
    metrics, registry = PortMetrics(), CollectorRegistry()
    metrics.http = port
    registry.register(metrics)

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"manyhats_http_{name}")

    await port.start()
    host, _, number = port.address.rpartition(":")
    try:
        with ExitStack() as stack:

            def connect(asks: bool) -> None:
                client = stack.enter_context(socket.create_connection((host, int(number)), timeout=5))
                if asks:
                    client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")

            await asyncio.to_thread(connect, True)
            await eventually(lambda: value("requests_in_flight") == 1)
            await asyncio.to_thread(connect, False)
            await eventually(lambda: value("connections") == 2)
            assert value("connections_refused_total") == 0
            await asyncio.to_thread(connect, True)  # in place of the idle one
            await eventually(lambda: value("requests_in_flight") == 2)
            assert value("connections_refused_total") == 1
            await asyncio.to_thread(connect, True)  # in nobody's place
            await eventually(lambda: value("connections_refused_total") == 2)
            await eventually(lambda: value("connections") == 2)
    finally:
        await port.stop(0.0)
