"""Writes the answer of one request, whole or as a stream, within the limits of its reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.types import Scope, Send

from manyhats.server.http import sse
from manyhats.server.http.connection import transport_of
from manyhats.server.http.status import Refusal
from manyhats.server.service.answers import Answers

PING_S = 15.0
_PIECE_BYTES = 64 * 1024  # one waits for its reader before the next is written
_JSON = {"content-type": "application/json"}


class Writer:
    """Writes one answer.

    Args:
        send: ASGI's.
        scope: ASGI's.
        answers: bounds what is left unread.
        ping_s: how long a stream may be silent before a comment is sent.
    """

    def __init__(self, send: Send, scope: Scope, answers: Answers, *, ping_s: float | None = None) -> None:
        self._send = send
        self._transport = transport_of(scope)
        self._answer = answers.answer(self._drop)
        self._ping_s = PING_S if ping_s is None else ping_s
        self._has_begun = False
        self._is_stream = False
        self._is_named = False
        self.has_ended = False
        self._turn = asyncio.Lock()  # of the events and of what breaks their silence
        self._sent_s = time.monotonic()
        self.headers: dict[str, str] = {}
        self.is_aborted = False

    async def whole(self, answer: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        """Send an answer as JSON, or as it is if it is bytes."""
        data = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
        length = {"content-length": str(len(data))}
        with self._answer.sending(len(data)):
            await self._begin(status, {**_JSON, **length, **headers})
            for begin in range(0, max(len(data), 1), _PIECE_BYTES):
                end = begin + _PIECE_BYTES
                self.has_ended = end >= len(data)
                await self._write(data[begin:end], is_last=self.has_ended)

    async def stream(self, events: AsyncGenerator[Any, None]) -> None:
        """Send events as they come; nothing is sent before the first, unless it takes long.

        Events with a name, ``event``, say themselves which is the last.
        """
        self._is_stream = True
        pinging = asyncio.create_task(self._ping())
        try:
            async with aclosing(events):
                async for each in events:
                    name = getattr(each, "event", "")
                    self._is_named = bool(name)
                    await self._event(sse.event(each, name))
            await self._end(b"" if self._is_named else sse.DONE)
        finally:
            pinging.cancel()

    async def fail(self, refusal: Refusal) -> None:
        """Say why there is no answer, or why it ends; a whole one that is cut is seen by its length."""
        if not self._has_begun:
            await self.whole(refusal.body, refusal.status, refusal.headers)
        elif self._is_named and not self.has_ended:
            await self._end(b"")  # the last event said why
        elif self._is_stream and not self.has_ended:
            await self._event(sse.event(refusal.body))
            await self._end(sse.DONE)
        else:
            self.abort()

    def close(self) -> None:
        """End the answer."""
        self._answer.close()

    def abort(self) -> None:
        """Close the connection, whatever it still has to send."""
        self.is_aborted = True
        if self._transport is not None:
            self._transport.abort()

    async def _event(self, data: bytes, *, is_last: bool = False) -> None:
        async with self._turn:
            with self._answer.sending(len(data)):
                if not self._has_begun:
                    await self._begin(200, sse.HEADERS)
                self.has_ended = is_last
                await self._write(data, is_last=is_last)

    async def _end(self, data: bytes) -> None:
        await self._event(data, is_last=True)

    async def _ping(self) -> None:
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s >= self._ping_s:
                silent_s = 0.0
                if not self._turn.locked():  # else something is on its way already
                    await self._event(sse.PING)
            await asyncio.sleep(self._ping_s - silent_s)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self._has_begun = True
        named = {**headers, **self.headers}
        pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _write(self, data: bytes, *, is_last: bool = False) -> None:
        self._sent_s = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    def _drop(self, then: Callable[[], None]) -> None:
        self.abort()  # and with it what the transport has not written
        then()
