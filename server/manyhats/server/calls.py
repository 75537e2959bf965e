"""Around every call of the API: admission, errors to statuses, metrics and one log line."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from google.rpc import status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from manyhats.adapters.errors import shown
from manyhats.server.from_proto import task_of
from manyhats.server.gate import Gate
from manyhats.server.metrics import Metrics
from manyhats.server.status import INTERNAL, case_of, status_of

SERVICE_PREFIX = "/manyhats.v1."
# A caller whose deadline passes cancels a little before the deadline as this server counts it.
_DEADLINE_SLACK_S = 0.1
_TIMED_METHODS = frozenset({"Generate", "GenerateStream", "Score"})
_log = structlog.get_logger("manyhats.calls")

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Lets the servicers raise domain errors and know nothing of statuses, metrics or shutdown."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one of our methods; others (health, reflection) pass as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(SERVICE_PREFIX):
            return handler
        return self._wrapped(handler, handler_call_details.method.rpartition("/")[2])

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(request: Any, context: Context) -> Any:
            respond = handler.stream_unary if handler.request_streaming else handler.unary_unary
            return await self._observed(method, request, context, lambda: respond(request, context))

        async def stream(request: Any, context: Context) -> None:
            # Written from here rather than yielded, so that a cancelled call closes the servicer's generator,
            # and with it the engine's, at once instead of when it is collected.
            async def send() -> None:
                responses: AsyncGenerator[Any, None] = handler.unary_stream(request, context)
                async with aclosing(responses):
                    async for response in responses:
                        await context.write(response)

            await self._observed(method, request, context, send)

        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, *serializers)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(unary, *serializers)
        return grpc.unary_unary_rpc_method_handler(unary, *serializers)

    async def _observed(
        self, method: str, request: Any, context: Context, respond: Callable[[], Awaitable[T]]
    ) -> T:
        structlog.contextvars.clear_contextvars()
        call = _Call(method, getattr(request, "task_id", None), time.monotonic())
        try:
            with self._gate.admitted():
                answer = await respond()
        except asyncio.CancelledError:
            remaining_s = context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= _DEADLINE_SLACK_S
            late, cancelled = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED
            self._finished(call, late if is_late else cancelled)
            raise
        except Exception as error:
            # Counted first: who has the answer finds it in the metrics.
            self._finished(call, case_of(error).code)
            await context.abort_with_status(rpc_status.to_status(_logged_status(error, method)))
            raise
        self._finished(call, grpc.StatusCode.OK)
        return answer

    def _finished(self, call: _Call, code: grpc.StatusCode) -> None:
        seconds = time.monotonic() - call.begin_s
        is_timed = call.method in _TIMED_METHODS and call.name is not None
        # No name means the base model where something runs on one, and no task elsewhere.
        task_id = task_of(call.name or "") if call.name or is_timed else None
        self._metrics.call_finished(call.method, task_id, code.name, seconds if is_timed else None)
        _log.info(
            "call", method=call.method, task=shown(call.name or ""), code=code.name, seconds=round(seconds, 4)
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: its RPC, the task or version it names ("" for none), and when it came.

    A call that was refused before its message was read, and a stream of messages, have no ``name``.
    """

    method: str
    name: str | None
    begin_s: float


def _logged_status(error: Exception, method: str) -> status_pb2.Status:
    """What the caller sees; an unexpected error goes to the log whole, under the id that the caller gets."""
    error_id = uuid.uuid4().hex
    if case_of(error) is INTERNAL:
        _log.error("unexpected error", method=method, error_id=error_id, exc_info=error)
    return status_of(error, error_id=error_id)
