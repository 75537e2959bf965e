"""A streamed answer of the asyncio client. Its twin is ``stream.py``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self

import grpc.aio

from manyhats.client import convert
from manyhats.client.results import Generation, GenerationChunk
from manyhats.client.status import error_from_call
from manyhats.v1 import generation_pb2


class StreamCall(Protocol):
    """A running server-streaming call."""

    def __aiter__(self) -> AsyncIterator[generation_pb2.GenerateStreamResponse]: ...

    def cancel(self) -> bool:
        """End it, unless it has ended."""


class AsyncGenerationStream:
    """A streamed answer: iterate it for the pieces, or take the whole with ``result``.

    Use it as an async context manager, or call ``close``: leaving it early cancels the request on the server.
    Cancelling the task that reads it does so, too.
    """

    def __init__(self, call: StreamCall, target: str) -> None:
        self._call = call
        self._responses = aiter(call)
        self._target = target
        self._chunks: list[GenerationChunk] = []
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            response = await anext(self._responses)
        except StopAsyncIteration:
            self._is_closed = True
            raise
        except asyncio.CancelledError:
            if self._was_closed() and not _is_task_cancelled():
                raise StopAsyncIteration from None
            self._is_closed = True
            raise
        except grpc.aio.AioRpcError as error:
            self._is_closed = True
            raise error_from_call(error, self._target) from error
        self._chunks.append(convert.generation_chunk(response))
        return self._chunks[-1]

    async def result(self) -> Generation:
        """The answer: reads the rest of the stream, and joins all pieces.

        After an early ``close`` it is what had come by then, with ``FinishReason.UNSPECIFIED``.
        """
        async for _ in self:
            pass
        return convert.join_chunks(self._chunks)

    async def close(self) -> None:
        """Cancels the request if it is still running; harmless otherwise."""
        self._is_closed = True
        self._call.cancel()

    def _was_closed(self) -> bool:
        return self._is_closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _is_task_cancelled() -> bool:
    """Whether the running task was cancelled, rather than the call it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
