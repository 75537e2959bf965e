"""Callers of such servers, which read as little of an answer as they can."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc

from manyhats.v1.generation_pb2 import GenerateRequest, SamplingParams, StoppingParams

_PROMPT = "Hello, world"
_METHOD = "/manyhats.v1.GenerationService/GenerateStream"


_SPARE_TOKENS = 250
"""How many more than needed a stream asks for, to be spent until the last one has begun; all leave before."""


class Client:
    """Lives in a worker process."""

    def stream(self, transport: str, address: str, num_streams: int, num_together: int) -> None:
        """Open so many streams, read until all of them have had so many steps together, and leave."""
        way = _grpc if transport in ("grpc", "bare") else partial(_http, transport)
        asyncio.run(way(address, _Together(num_streams, num_together + num_streams)))


class _Together:
    """Counts what each stream gets from when the last one has begun."""

    def __init__(self, num_streams: int, num_messages: int) -> None:
        self.num_streams = num_streams
        self.num_tokens = num_messages + _SPARE_TOKENS
        self._num_messages = num_messages
        self._num_begun = 0

    async def follow(self, messages: AsyncIterator[object]) -> None:
        """Read a stream until it has had enough with all the others, or to its end."""
        await anext(messages)
        self._num_begun += 1
        num_read = 0
        async for _ in messages:
            if self._num_begun == self.num_streams:
                num_read += 1
            if num_read == self._num_messages:
                break


async def _grpc(address: str, together: _Together) -> None:
    request = GenerateRequest(
        text=_PROMPT,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_new_tokens=together.num_tokens, ignore_eos=True),
    ).SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_stream(_METHOD)

        async def read() -> None:
            call = method(request)
            await together.follow(aiter(call))
            call.cancel()

        await asyncio.gather(*(read() for _ in range(together.num_streams)))


async def _http(kind: str, address: str, together: _Together) -> None:
    body: dict[str, Any] = {"stream": True, "ignore_eos": True, "temperature": 0}
    body["max_tokens"] = together.num_tokens
    if kind == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": _PROMPT}]
    else:
        path = "/v1/completions"
        body["prompt"] = _PROMPT
    data = json.dumps(body).encode()
    start = f"POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    request = f"{start}content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data
    host, _, port = address.rpartition(":")

    async def read() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head:
            raise ConnectionError(f"{address} answered {head!r}")
        await together.follow(_pieces(reader))
        writer.close()

    await asyncio.gather(*(read() for _ in range(together.num_streams)))


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(65536):
        yield piece
