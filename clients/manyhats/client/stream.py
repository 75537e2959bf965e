"""A streamed answer of the blocking client. Its twin is ``aio_stream.py``."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self, cast

import grpc

from manyhats.client import convert
from manyhats.client.results import Generation, GenerationChunk
from manyhats.client.status import FailedCall, error_from_call
from manyhats.v1 import generation_pb2


class StreamCall(Protocol):
    """A running server-streaming call."""

    def __next__(self) -> generation_pb2.GenerateStreamResponse: ...

    def cancel(self) -> bool:
        """End it, unless it has ended."""


class GenerationStream:
    """A streamed answer: iterate it for the pieces, or take the whole with ``result``.

    Use it as a context manager, or call ``close``: leaving it early cancels the request on the server.
    It is for one thread; only ``close`` may come from another.
    """

    def __init__(self, call: StreamCall, target: str) -> None:
        self._call = call
        self._target = target
        self._chunks: list[GenerationChunk] = []
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationChunk:
        if self._is_closed:
            raise StopIteration
        try:
            response = next(self._call)
        except StopIteration:
            self._is_closed = True
            raise
        except grpc.RpcError as error:
            if self._is_closed:
                raise StopIteration from None
            self._is_closed = True
            raise error_from_call(cast(FailedCall, error), self._target) from error
        self._chunks.append(convert.generation_chunk(response))
        return self._chunks[-1]

    def result(self) -> Generation:
        """The answer: reads the rest of the stream, and joins all pieces.

        After an early ``close`` it is what had come by then, with ``FinishReason.UNSPECIFIED``.
        """
        for _ in self:
            pass
        return convert.join_chunks(self._chunks)

    def close(self) -> None:
        """Cancels the request if it is still running; harmless otherwise."""
        self._is_closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
