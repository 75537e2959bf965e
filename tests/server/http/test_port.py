"""Connections of the HTTP port."""

from __future__ import annotations

import asyncio
import socket

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from manyhats.server.http.connection import transport_of
from manyhats.server.http.port import HttpPort


async def test_small_answers_do_not_wait_for_acknowledgements() -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        transport = transport_of(scope)
        assert transport is not None
        connected = transport.get_extra_info("socket")
        seen.append(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await PlainTextResponse("ok")(scope, receive, send)

    port = HttpPort(app, host="127.0.0.1", port=0)
    await port.start()
    try:
        host, _, number = port.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"ok")
        writer.close()
    finally:
        await port.stop(0.0)
    assert len(seen) == 1
    assert seen[0] != 0
