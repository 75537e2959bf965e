"""HTTP over a socket, byte for byte, as no client would let us send it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What a server answered; ``status`` is 0 if it closed the connection without a word."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


def head(path: str, length: int | None, *headers: str, method: str = "POST") -> bytes:
    """The head of a request of JSON; no ``length`` leaves its header out."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *headers]
    if not any(each.lower().startswith("content-type") for each in headers):
        lines.append("content-type: application/json")
    if length is not None:
        lines.append(f"content-length: {length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def request(path: str, body: bytes | str | Any, *headers: str, method: str = "POST") -> bytes:
    """A request with a body: bytes or a text as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return head(path, len(data), *headers, method=method) + data


async def exchange(address: str, data: bytes, *, timeout_s: float = 10.0) -> Reply:
    """Send bytes on a connection of their own, and read one answer."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(timeout_s):
            writer.write(data)
            return await read_reply(reader)
    except ConnectionError:
        return Reply(0, {}, b"")
    finally:
        writer.close()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """The next answer on a connection."""
    first = await reader.readline()
    if not first:
        return Reply(0, {}, b"")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Reply(int(first.split()[1]), headers, body)
