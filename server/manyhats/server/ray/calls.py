"""Calls that reach a replica through Ray Serve, answered by the services as those of a gRPC port are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from manyhats.server.access.tokens import TokenFile
from manyhats.server.grpc.interceptor import CallInterceptor
from manyhats.server.grpc.port import HealthFollower, add_services
from manyhats.server.ray.ingress import TIME_KEY, Metadata, collected
from manyhats.server.ray.pieces import pieces_of
from manyhats.server.service.answers import Answers
from manyhats.server.service.call import Calls

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Wire:
    """A message in wire format, as Serve takes it."""

    data: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802
        """Its bytes."""
        return self.data


class ProxiedCalls:
    """Answers the methods of all services.

    Args:
        calls: admits and accounts for them.
        answers: sends their answers.
        tokens: knows callers; None lets everyone do everything.
        health: answers health checks.
        limit_s: what a call may take at most. Now and then Serve does not tell a replica that a caller has left.
    """

    def __init__(
        self,
        calls: Calls,
        answers: Answers,
        tokens: TokenFile | None,
        health: HealthFollower,
        limit_s: float,
    ) -> None:
        self._interceptor = CallInterceptor(calls, answers, tokens)
        self._limit_s = limit_s
        services = collected(lambda server: add_services(server, calls, health))
        self._handlers = {
            f"/{service}/{method}": handler
            for service, handlers in services.items()
            for method, handler in handlers.items()
        }

    async def answer(self, path: str, request: Any, context: Any) -> Wire:
        """The one message that answers a call; an empty one if there is none, beside the status.

        Args:
            path: the method's.
            request: its message's bytes; of an upload an iterator over them.
            context: Serve's, which takes the status.
        """
        written: list[bytes] = []

        async def write(data: bytes) -> None:
            written.append(data)

        await self._run(path, request, context, write)
        return Wire(b"".join(written))

    async def stream(self, path: str, request: Any, context: Any) -> AsyncGenerator[Wire, None]:
        """The messages that answer a call; last an empty one if it fails, to carry the status."""

        async def make(put: Callable[[bytes], None]) -> None:
            async def write(data: bytes) -> None:
                put(data)

            await self._run(path, request, context, write)

        async with aclosing(pieces_of(make)) as pieces:
            async for data in pieces:
                yield Wire(data)
        if context.code():
            yield Wire(b"")

    async def _run(self, path: str, request: Any, context: Any, write: Write) -> None:
        metadata: Metadata = tuple(context.invocation_metadata())
        limit_s = min([self._limit_s, *(int(value) / 1000 for key, value in metadata if key == TIME_KEY)])
        proxied = ProxiedContext(context, write, limit_s)
        handler: Any = await self._interceptor.intercept_service(self._found, _Details(path, metadata))
        if hasattr(request, "__aiter__"):
            request = _read(request, handler.request_deserializer)
        elif handler.request_deserializer is not None:
            request = handler.request_deserializer(request)
        try:
            async with asyncio.timeout(limit_s):
                answer = await _function(handler)(request, proxied)
                if answer is not None:  # of health checks; the services write their own
                    await write(handler.response_serializer(answer))
        except TimeoutError:
            context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
            context.set_details("the call took too long")
        except Exception:
            if not context.code():  # else it is the caller's to know, and accounted for
                raise
        finally:
            proxied.end()

    async def _found(self, details: grpc.HandlerCallDetails) -> Any:
        return self._handlers[details.method]


@dataclass(frozen=True, slots=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: Metadata


def _function(handler: Any) -> Callable[[Any, Any], Awaitable[Any]]:
    """The one function of a handler."""
    functions = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    (function,) = filter(None, functions)
    return partial(function)


async def _read(requests: Any, deserialize: Callable[[bytes], Any] | None) -> AsyncIterator[Any]:
    """An upload's messages; one that is cancelled has no end."""
    async for data in requests:
        yield data if deserialize is None else deserialize(data)
    if requests.is_cancelled():
        raise asyncio.CancelledError


class ProxiedContext:
    """Stands for gRPC's context, as far as calls use it; their status goes into Serve's.

    Args:
        context: Serve's.
        write: takes a message.
        limit_s: what is left of the call's time, as it begins.
    """

    def __init__(self, context: Any, write: Write, limit_s: float) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._end_s = self._loop.time() + limit_s
        self._then: list[Callable[[Any], object]] = []
        self.write = write

    def peer(self) -> str:
        """Who called, as the proxy saw it."""
        return str(self._context.peer())

    def invocation_metadata(self) -> Metadata:
        """What the caller sent, and the proxy added."""
        return tuple(self._context.invocation_metadata())

    def time_remaining(self) -> float:
        """Seconds until the call is ended."""
        return max(0.0, self._end_s - self._loop.time())

    def add_done_callback(self, then: Callable[[Any], object]) -> None:
        """Have something called as the call ends."""
        self._then.append(then)

    async def send_initial_metadata(self, metadata: object) -> None:
        """Serve has none; the proxy has sent its own."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """Set the status. Serve would lose the metadata of one that is raised."""
        self._context.set_code(code)
        self._context.set_details(details)
        self._context.set_trailing_metadata([*trailing_metadata])

    def end(self) -> None:
        """The call has ended."""
        for then in self._then:
            then(self)
