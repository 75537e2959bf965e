"""Around every call of the API: admission, errors to statuses, metrics and one log line."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.rpc import status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from manyhats.adapters.errors import shown
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.grpc.answers import Answers
from manyhats.server.grpc.from_proto import task_of
from manyhats.server.grpc.messages import check_readable, readable, tolerant
from manyhats.server.grpc.status import status_of
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.gate import Gate
from manyhats.server.service.reasons import INTERNAL, reason_of

SERVICE_PREFIX = "/manyhats.v1."
# A caller whose deadline passes cancels a little before the deadline as this server counts it.
_DEADLINE_SLACK_S = 0.1
_TIMED_METHODS = frozenset({"Generate", "GenerateStream", "Score"})
_log = structlog.get_logger("manyhats.calls")

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Lets the servicers raise domain errors and know nothing of statuses, metrics or shutdown.

    Args:
        gate: admits calls.
        metrics: counts them.
        answers: sends what they are answered with.
    """

    def __init__(self, gate: Gate, metrics: Metrics, answers: Answers) -> None:
        self._gate = gate
        self._metrics = metrics
        self._answers = answers

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one of our methods; others (health, reflection) do as they do, on messages alone."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if not handler_call_details.method.startswith(SERVICE_PREFIX):
            return _of_messages(handler)
        method = handler_call_details.method.rpartition("/")[2]
        if self._gate.is_full:
            return self._refusing(method)
        return self._wrapped(handler, method)

    def _refusing(self, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        """Admits no more calls, without reading the message."""

        async def respond() -> None:
            """Not called: the gate is asked first, and if it has room again, the caller comes back."""
            raise self._gate.full_error()

        async def refuse(requests: Any, context: Context) -> None:
            await self._observed(method, None, context, respond)

        # Whatever the method takes, this takes a stream, and so reads nothing of it.
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        # Every answer is written from here, a single one too, as a stream of one looks the same to its caller: it is
        # sent, or given up, while the call is inside the gate and before it counts as answered. A stream that is
        # written rather than yielded has its servicer's generator, and with it the engine's, closed at once when the
        # call is cancelled, instead of when it is collected.
        serialize, send = handler.response_serializer, self._answers.send

        async def unary(request: Any, context: Context) -> None:
            async def respond() -> None:
                check_readable(request)
                await send(serialize(await handler.unary_unary(request, context)), context)

            await self._observed(method, request, context, respond)

        async def upload(requests: Any, context: Context) -> None:
            first = _Named()

            async def respond() -> None:
                messages = first.noted(readable(requests))
                answer = serialize(await handler.stream_unary(messages, context))
                await send(answer, context, is_first=False)  # the method has begun its answer

            await self._observed(method, first, context, respond)

        async def stream(request: Any, context: Context) -> None:
            async def respond() -> None:
                check_readable(request)
                responses: AsyncGenerator[Any, None] = handler.unary_stream(request, context)
                async with aclosing(responses):
                    is_first = True
                    async for response in responses:
                        await send(serialize(response), context, is_first=is_first)
                        is_first = False

            await self._observed(method, request, context, respond)

        deserialize = tolerant(handler.request_deserializer)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(upload, deserialize)
        return grpc.unary_stream_rpc_method_handler(
            stream if handler.response_streaming else unary, deserialize
        )

    async def _observed(
        self, method: str, request: Any, context: Context, respond: Callable[[], Awaitable[None]]
    ) -> None:
        structlog.contextvars.clear_contextvars()
        call = _Call(method, request, time.monotonic())
        try:
            with self._gate.admitted():
                await respond()
        except asyncio.CancelledError:
            remaining_s = context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= _DEADLINE_SLACK_S
            self._finished(call, "DEADLINE_EXCEEDED" if is_late else "CANCELLED")
            raise
        except Exception as error:
            # Counted first: who has the answer finds it in the metrics.
            self._finished(call, reason_of(error).code)
            await context.abort_with_status(rpc_status.to_status(_logged_status(error, method)))
            raise
        self._finished(call, "OK")

    def _finished(self, call: _Call, code: str) -> None:
        seconds = time.monotonic() - call.begin_s
        is_timed = call.method in _TIMED_METHODS and call.name is not None
        # No name means the base model where something runs on one, and no task elsewhere.
        task_id = task_of(call.name or "") if call.name or is_timed else None
        self._metrics.call_finished(call.method, task_id, code, seconds if is_timed else None)
        _log.info(
            "call", method=call.method, task=shown(call.name or ""), code=code, seconds=round(seconds, 4)
        )


def _of_messages(handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of a service that is not ours, behind a check that there is a message."""

    async def unary(request: Any, context: Context) -> Any:
        await _refuse_unreadable(request, context)
        return await handler.unary_unary(request, context)

    async def stream(request: Any, context: Context) -> None:
        await _refuse_unreadable(request, context)
        await handler.unary_stream(request, context)  # writes by itself

    async def both(requests: Any, context: Context) -> AsyncIterator[Any]:
        async def readable_or_refused() -> AsyncIterator[Any]:
            async for request in requests:
                await _refuse_unreadable(request, context)
                yield request

        async for response in handler.stream_stream(readable_or_refused(), context):
            yield response

    serializers = (tolerant(handler.request_deserializer), handler.response_serializer)
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(both, *serializers)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(stream, *serializers)
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(unary, *serializers)
    refusing: grpc.RpcMethodHandler[Any, Any] = handler  # of a caller without a token: reads nothing
    return refusing


async def _refuse_unreadable(request: object, context: Context) -> None:
    try:
        check_readable(request)
    except FieldInvalidError as error:
        await context.abort_with_status(rpc_status.to_status(status_of(error, error_id="")))


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: its RPC, its message, and when it came."""

    method: str
    request: Any
    begin_s: float

    @property
    def name(self) -> str | None:
        """The task or version it names, "" for none; None where no message came, or such messages name none."""
        name: str | None = getattr(self.request, "task_id", None)
        return name


class _Named:
    """What an upload's messages name, once the first has come."""

    task_id: str | None = None

    async def noted(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages, the task of the header noted."""
        async for message in messages:
            if self.task_id is None:
                self.task_id = message.header.task_id
            yield message


def _logged_status(error: Exception, method: str) -> status_pb2.Status:
    """What the caller sees; an unexpected error goes to the log whole, under the id that the caller gets."""
    error_id = uuid.uuid4().hex
    if reason_of(error) is INTERNAL:
        _log.error("unexpected error", method=method, error_id=error_id, exc_info=error)
    return status_of(error, error_id=error_id)
