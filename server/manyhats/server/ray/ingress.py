"""What Ray Serve's gRPC proxies know of the services: their methods, and how a call travels to a replica and back.

A proxy passes messages as bytes, unread. To a replica it adds what Serve leaves behind: the time that is left of the
call, and the task as the model to route by. Of the replica's answers it holds back the last one of a call that failed,
which only carries the status: otherwise a stream's caller would take it for a message. And where a replica ends before
its answer does, it says so by the status of a server that is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2_grpc

from manyhats.server.ray.pieces import pieces_of
from manyhats.v1 import adapter_pb2_grpc, encoding_pb2_grpc, generation_pb2_grpc, server_pb2_grpc

TASK_KEY: Final = "x-manyhats-task"
MODEL_KEY: Final = "multiplexed_model_id"
"""By which Serve routes."""
TIME_KEY: Final = "x-manyhats-time-left-ms"

# To the caller of an upload, at once: the replica's word that the header is accepted cannot overtake its answer.
_ACCEPTED = (("manyhats-upload", "accepted"),)
_DETAILS_KEY = "grpc-status-details-bin"
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_ADD_SERVICER: tuple[Callable[[Any, Any], None], ...] = (
    generation_pb2_grpc.add_GenerationServiceServicer_to_server,
    encoding_pb2_grpc.add_EncodingServiceServicer_to_server,
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server,
    server_pb2_grpc.add_ServerServiceServicer_to_server,
    health_pb2_grpc.add_HealthServicer_to_server,
)

Metadata = tuple[tuple[str, str | bytes], ...]
Handlers = Mapping[str, Any]


class Collected:
    """Takes the place of a gRPC server, and keeps the handlers that are registered on it."""

    def __init__(self) -> None:
        self.services: dict[str, Handlers] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Generated code registers everything twice: this is the older way."""

    def add_registered_method_handlers(self, service: str, handlers: Handlers) -> None:
        """Keep a service's handlers, by method."""
        self.services[service] = handlers


def collected(add_servicer: Callable[[Any], None]) -> dict[str, Handlers]:
    """Service → method → handler, of what a function registers on a server."""
    server = Collected()
    add_servicer(server)
    return server.services


def streaming_paths() -> dict[str, bool]:
    """Path of each method → whether it answers by a stream. Serve calls a replica by the last part, which is unique."""
    return {path: bool(handler.response_streaming) for path, handler in _handlers().items()}


def add_services(servicer: Any, server: Any) -> None:
    """Register all methods on a proxy's server: a ``grpc_servicer_functions`` of Serve's gRPC options.

    Args:
        servicer: Serve's stand-in, not used: Serve replaces every method's function by one that calls a replica.
        server: the proxy's.
    """
    server.add_generic_rpc_handlers((_Proxied(_handlers()),))


class _Anything:
    """A servicer that has every method."""

    def __getattr__(self, name: str) -> None:
        return None


def _handlers() -> dict[str, Any]:
    """Path → handler that reads and makes no messages."""
    raw: dict[str, Any] = {}
    for add_servicer in _ADD_SERVICER:
        for service, handlers in collected(partial(add_servicer, _Anything())).items():
            for method, handler in handlers.items():
                raw[f"/{service}/{method}"] = handler._replace(
                    request_deserializer=None, response_serializer=None
                )
    return raw


class _Proxied(grpc.GenericRpcHandler):
    """Serve reads ``_method_handlers`` and replaces them, as it does those of generated code."""

    def __init__(self, handlers: Handlers) -> None:
        self._method_handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call, with what goes around Serve's function; None if it is not ours."""
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None:
            return None
        if handler.request_streaming:
            return handler._replace(stream_unary=_uploading(handler.stream_unary))
        if handler.response_streaming:
            return handler._replace(unary_stream=_streaming(handler.unary_stream))
        return handler._replace(unary_unary=_answering(handler.unary_unary))


def _answering(serve: Callable[..., Any]) -> Callable[..., Any]:
    async def answer(request: bytes, context: Any) -> Any:
        message = await serve(request, _Telling(context))
        await _abort_if_failed(context)
        return message

    return answer


def _uploading(serve: Callable[..., Any]) -> Callable[..., Any]:
    async def upload(requests: AsyncIterator[bytes], context: Any) -> Any:
        await context.send_initial_metadata(_ACCEPTED)
        message = await serve(requests, _Telling(context))
        await _abort_if_failed(context)
        return message

    return upload


def _streaming(serve: Callable[..., Any]) -> Callable[..., Any]:
    async def stream(request: bytes, context: Any) -> None:
        async def relay(put: Callable[[bytes], None]) -> None:
            async for message in serve(request, _Telling(context)):
                if not context.code():
                    put(message)

        async with aclosing(pieces_of(relay)) as messages:
            async for message in messages:
                await context.write(message)
        await _abort_if_failed(context)

    return stream


async def _abort_if_failed(context: Any) -> None:
    """End a call by the status that Serve set, and by nothing else: clients try again only what has no answer yet."""
    code, details = _CODES.get(context.code(), context.code()), context.details()
    if code in (None, grpc.StatusCode.OK):
        return
    trailing: Metadata = tuple(context.trailing_metadata() or ())
    if code is grpc.StatusCode.INTERNAL and all(key != _DETAILS_KEY for key, _ in trailing):
        # Serve says so of a replica that ended, and nobody tries it again. Replicas give their own errors details.
        code, details = grpc.StatusCode.UNAVAILABLE, "the replica ended before its answer did"
    await context.abort(code, details, trailing)


class _Telling:
    """gRPC's context of a call, whose metadata tell the replica what Serve does not."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> Metadata:
        """The caller's, the time that is left, and unless the caller says it itself the model to route by."""
        given: Metadata = tuple(self._context.invocation_metadata() or ())
        told = tuple((key, value) for key, value in given if key != TIME_KEY)
        left_s: float | None = self._context.time_remaining()
        if left_s is not None:
            told += ((TIME_KEY, str(max(0, round(1000 * left_s)))),)
        named = dict(given)
        if TASK_KEY in named and MODEL_KEY not in named:
            # All versions go where the task is: one that is made active is in memory there already.
            told += ((MODEL_KEY, str(named[TASK_KEY]).partition("@")[0]),)
        return told
