"""What surrounds every gRPC call: its caller and access, its messages, its answer, and errors as statuses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog
from grpc_status import rpc_status

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.access.errors import ServerError
from manyhats.server.access.rules import check_access
from manyhats.server.access.tokens import EVERYBODY, Caller, Scope, TokenFile
from manyhats.server.grpc.answers import answering, send
from manyhats.server.grpc.messages import SMALL_BYTES, Unread, check_readable, readable, tolerant
from manyhats.server.grpc.status import retry_metadata, status_of
from manyhats.server.observability.traceparent import HEADER, read_traceparent
from manyhats.server.service.answers import Answers
from manyhats.server.service.call import Call, Calls
from manyhats.server.service.text_threads import TextThreads

_SERVICE_PREFIX = "/manyhats.v1."
# Methods open to everyone: a probe has no token.
OPEN_METHODS = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "Watch", "List"))
_NOBODY = Caller(name="", roles=frozenset(), scope=Scope(()))

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # no generic type at run time
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]


@dataclass(slots=True, kw_only=True)
class GrpcCall(Call):
    """A call through gRPC, with its context; servicers get it instead of gRPC's context."""

    context: Context


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Lets servicers raise domain errors and know nothing of callers, statuses, metrics or shutdown.

    Credential and role are checked before a byte of the message is read, its task before it is handled.

    Args:
        calls: admits and accounts for them.
        answers: sends their answers.
        tokens: knows callers; None lets everyone do everything.
    """

    def __init__(self, calls: Calls, answers: Answers, tokens: TokenFile | None) -> None:
        self._calls = calls
        self._answers = answers
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap the handler of one of our methods; for others (health, reflection), only check their messages."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        is_ours = handler_call_details.method.startswith(_SERVICE_PREFIX)
        method = handler_call_details.method.rpartition("/")[2]
        if is_ours and self._calls.gate.is_full:
            return self._refusing_for_now(method)
        try:
            caller = self._caller(handler_call_details)
        except ServerError as error:
            return self._refusing(method, error) if is_ours else _aborting(error)
        return self._wrapped(handler, method, caller) if is_ours else _of_messages(handler)

    def _caller(self, details: grpc.HandlerCallDetails) -> Caller:
        """The caller of a call.

        Raises:
            ServerError: the caller is unknown, or has no role for the method.
        """
        if self._tokens is None or details.method in OPEN_METHODS:
            return EVERYBODY
        metadata = details.invocation_metadata or ()
        caller = self._tokens.bearer([str(value) for key, value in metadata if key == "authorization"])
        check_access(details.method.rpartition("/")[2], None, caller)
        return caller

    def _refusing_for_now(self, method: str) -> Handler:
        async def refuse(requests: Any, context: Context) -> None:
            async with self._call(method, _NOBODY, context):
                # Not reached: the gate is asked first, and if it has room again, the caller comes back.
                raise self._calls.gate.full_error()

        return _unread(refuse)

    def _refusing(self, method: str, error: ServerError) -> Handler:
        async def refuse(requests: Any, context: Context) -> None:
            async with self._call(method, _NOBODY, context):
                structlog.contextvars.bind_contextvars(peer=context.peer())
                raise error

        return _unread(refuse)

    def _wrapped(self, handler: Any, method: str, caller: Caller) -> Handler:
        # Every answer is written from here, including single ones, since a stream of one looks the same to the caller:
        # it is sent or abandoned while the call is inside the gate and before it counts as answered. Because a stream
        # is written rather than yielded, its servicer's generator, and with it the engine's, is closed as soon as the
        # call is cancelled, not when it is garbage collected.
        serialize, answers = handler.response_serializer, self._answers

        async def unary(request: Any, context: Context) -> None:
            async with self._call(method, caller, context) as call:
                with self._message() as take, answering(answers, context) as answer:
                    message = await self._read(request, call, take)
                    await send(answer, serialize(await handler.unary_unary(message, call)), context)

        async def upload(requests: Any, context: Context) -> None:
            async with self._call(method, caller, context) as call:
                with answering(answers, context) as answer:
                    uploaded = await handler.stream_unary(self._named(requests, call), call)
                    # The method has begun its answer.
                    await send(answer, serialize(uploaded), context, is_first=False)

        async def stream(request: Any, context: Context) -> None:
            async with self._call(method, caller, context) as call:
                is_first = True
                with self._message() as take, answering(answers, context) as answer:
                    message = await self._read(request, call, take)
                    responses: AsyncGenerator[Any, None] = handler.unary_stream(message, call)
                    async with aclosing(responses):
                        async for response in responses:
                            await send(answer, serialize(response), context, is_first=is_first)
                            is_first = False

        deserialize = tolerant(handler.request_deserializer)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(upload, deserialize)
        answer = stream if handler.response_streaming else unary
        return grpc.unary_stream_rpc_method_handler(answer, deserialize)

    async def _read(self, request: Any, call: Call, take: Callable[[int], None]) -> Any:
        """A call's message; the tasks that it names are noted. Small ones are bounded by the number of calls."""
        if isinstance(request, Unread):
            take(request.num_bytes)
        message = await readable(request, self._text_threads)
        for name in _names(message):
            call.names(name)
        return message

    async def _named(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        """The messages of an upload; each is looked at for a header, which names a task."""
        async for request in requests:
            message = await readable(request, self._text_threads)
            call.names(message.header.task_id)
            yield message

    def _message(self) -> AbstractContextManager[Callable[[int], None]]:
        return self._calls.gate.message()

    def _text_threads(self) -> TextThreads:
        return self._calls.gate.backend.text_threads

    @asynccontextmanager
    async def _call(self, method: str, caller: Caller, context: Context) -> AsyncIterator[GrpcCall]:
        """The call that has just arrived; an error becomes its status."""
        now_s = time.monotonic()
        remaining_s: float | None = context.time_remaining()  # None without a deadline
        deadline_s = None if remaining_s is None else now_s + remaining_s
        metadata = context.invocation_metadata() or ()
        call = GrpcCall(
            method=method,
            caller=caller,
            received_s=now_s,
            deadline_s=deadline_s,
            parent=read_traceparent([str(value) for key, value in metadata if key == HEADER]),
            context=context,
        )
        try:
            with self._calls.observed(call):
                yield call
        except Exception as error:
            await _abort(error, context)
            raise


def _names(request: Any) -> Sequence[str | None]:
    """The tasks that a message names; "" where it could, and names none."""
    if hasattr(request, "task_ids"):
        return list(request.task_ids) or [""]
    return [getattr(request, "task_id", None)]


def _unread(refuse: Any) -> Handler:
    """A handler that reads no message: whatever the method takes, it takes a stream."""
    return grpc.stream_unary_rpc_method_handler(refuse)


async def _abort(error: Exception, context: Context) -> None:
    status = rpc_status.to_status(status_of(error))
    metadata = (*status.trailing_metadata, *retry_metadata(error, context.time_remaining()))
    await context.abort(status.code, status.details, metadata)


def _aborting(error: ServerError) -> Handler:
    """Refuse a call to a service that is not ours."""

    async def refuse(requests: object, context: Context) -> None:
        await _abort(error, context)

    return _unread(refuse)


def _of_messages(handler: Any) -> Handler:
    """A handler of a service that is not ours, after a check that there is a message."""

    async def check(request: object, context: Context) -> None:
        try:
            check_readable(request)
        except FieldInvalidError as error:
            await _abort(error, context)

    async def unary(request: Any, context: Context) -> Any:
        await check(request, context)
        return await handler.unary_unary(request, context)

    async def stream(request: Any, context: Context) -> None:
        await check(request, context)
        await handler.unary_stream(request, context)  # writes its own answers

    async def both(requests: Any, context: Context) -> AsyncIterator[Any]:
        async def checked() -> AsyncIterator[Any]:
            async for request in requests:
                await check(request, context)
                yield request

        async for response in handler.stream_stream(checked(), context):
            yield response

    deserialize = tolerant(handler.request_deserializer, max_bytes=SMALL_BYTES)
    serializers = (deserialize, handler.response_serializer)
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(both, *serializers)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(stream, *serializers)
    return grpc.unary_unary_rpc_method_handler(unary, *serializers)
