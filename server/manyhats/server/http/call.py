"""What surrounds every call of the HTTP port: caller and access, body, answer, and errors as statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic

import anyio
import structlog
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from manyhats.engine.errors import EngineError
from manyhats.server.access.errors import CredentialMissingError, ServerError
from manyhats.server.access.rules import check_access
from manyhats.server.access.tokens import EVERYBODY, Caller, TokenFile
from manyhats.server.access.tokens import Scope as TaskScope
from manyhats.server.http.body import SMALL_BYTES, ByteStream, decoded, read_body
from manyhats.server.http.connection import transport_of
from manyhats.server.http.operation import Body, Operation
from manyhats.server.http.status import refusal_of
from manyhats.server.http.writer import Writer
from manyhats.server.observability.traceparent import HEADER, read_traceparent
from manyhats.server.service.answers import Answers
from manyhats.server.service.call import Call, Calls

_NOBODY = Caller(name="", roles=frozenset(), scope=TaskScope(()))
_log = structlog.get_logger("manyhats.calls")


@dataclass(slots=True, kw_only=True)
class HttpCall(Call):
    """A call through HTTP.

    Attributes:
        path: parameters of its path.
        query: of its address, not decoded.
        given: the headers of its request.
        num_bytes: of its body, unless that is read as it arrives.
        headers: what its answer says in headers besides its format.
    """

    path: Mapping[str, str] = field(default_factory=dict)
    query: bytes = b""
    given: Headers = field(default_factory=Headers)
    num_bytes: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def renamed(self, request_id: str | None) -> None:
        """Take the id that its body gives it, if any, in place of its header's.

        Raises:
            FieldInvalidError: it cannot be one.
        """
        if request_id:
            self.identify(request_id)
        self.headers["x-request-id"] = self.request_id or self.id

    def show_version(self) -> None:
        """Say in a header which version answers; nothing for the base model."""
        if self.version is not None:
            self.headers["x-manyhats-version"] = self.version.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the calls of one port have around them.

    Attributes:
        calls: admits and accounts for them.
        answers: bounds what they leave unread.
        tokens: knows callers; None lets everyone do everything.
        needs_certificate: whether a connection needs a client's certificate to make calls.
        is_lenient: whether unknown fields of a body are ignored.
        body_limit_s: how long a caller may send nothing of its body.
    """

    calls: Calls
    answers: Answers
    tokens: TokenFile | None = None
    needs_certificate: bool = False
    is_lenient: bool = False
    body_limit_s: float = 30.0
    _ignored: set[str] = field(default_factory=set)

    def note_ignored(self, name: str) -> None:
        """Log an unknown field, once for each of the first thousand names."""
        if name not in self._ignored and len(self._ignored) < 1000:
            self._ignored.add(name)
            _log.warning("unknown field ignored", field=name)


class Endpoint(Generic[Body]):
    """An ASGI application that answers one kind of call.

    Credential and role are checked before the body is read, the task once it is decoded.

    Args:
        around: what all calls of the port have around them.
        operation: what it reads, and who makes its answer.
    """

    def __init__(self, around: Surroundings, operation: Operation[Body]) -> None:
        self._around = around
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; ends early if its caller leaves."""
        writer = Writer(send, scope, self._around.answers)
        try:
            async with anyio.create_task_group() as tasks:

                async def unless_left() -> Message:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        if not writer.has_ended:  # else it only says that the answer is complete
                            tasks.cancel_scope.cancel()
                        await anyio.sleep_forever()
                    return message

                async def watch() -> None:
                    while True:
                        await unless_left()

                given = Headers(scope=scope)
                call = HttpCall(
                    method=self._operation.method,
                    caller=_NOBODY,
                    parent=read_traceparent(given.getlist(HEADER)),
                    path=scope.get("path_params", {}),
                    query=scope.get("query_string", b""),
                    given=given,
                    headers=writer.headers,
                )
                try:
                    with self._around.calls.gate.message() as take:
                        body, problem = await self._read(call, scope, receive, take)
                        if self._operation.body is ByteStream and problem is None:
                            body = ByteStream(unless_left, Headers(scope=scope))
                        else:
                            tasks.start_soon(watch)
                        await self._answer(call, body, problem, writer)
                except Exception as error:  # noqa: BLE001 - whatever it is, its caller is told
                    await self._fail(writer, error)
                tasks.cancel_scope.cancel()
        except asyncio.CancelledError:  # the server is stopping
            writer.abort()
        finally:
            writer.close()
        if writer.is_aborted:
            await asyncio.sleep(0)  # uvicorn hears of it, and does not complain that the answer has no end

    async def _fail(self, writer: Writer, error: Exception) -> None:
        try:
            await writer.fail(refusal_of(error, self._operation.name_of))
        except (EngineError, ServerError):  # that is not read either
            writer.abort()

    async def _read(
        self, call: HttpCall, scope: Scope, receive: Receive, take: Callable[[int], None]
    ) -> tuple[Any, Exception | None]:
        """The body, unless it is read as it arrives, and what keeps the call from being answered."""
        headers = Headers(scope=scope)
        call.renamed(None)
        try:
            call.caller = self._caller(scope, headers)
            call.identify(headers.get("x-request-id", ""))
            call.renamed(None)
            if self._operation.body in (None, ByteStream) or self._around.calls.gate.is_full:
                return None, None
            ignored = self._around.note_ignored if self._around.is_lenient else None
            data = await read_body(receive, headers, take, self._around.body_limit_s)
            call.num_bytes = len(data)
            work = partial(decoded, data, self._operation.body, ignored)
            if len(data) <= SMALL_BYTES:
                return work(), None
            return await self._around.calls.gate.backend.text_threads.read(work, len(data)), None
        except Exception as error:  # noqa: BLE001 - raised again where the call is accounted for
            return None, error

    async def _answer(self, call: HttpCall, body: Any, problem: Exception | None, writer: Writer) -> None:
        with self._around.calls.observed(call):
            if problem is not None:
                raise problem
            structlog.contextvars.bind_contextvars(request_id=call.request_id)
            answer = await self._operation.handle(call, body)
            if isinstance(answer, AsyncGenerator):
                await writer.stream(answer)
            else:
                call.headers["openai-processing-ms"] = str(round(1000 * (time.monotonic() - call.received_s)))
                await writer.whole(answer)

    def _caller(self, scope: Scope, headers: Headers) -> Caller:
        """The caller of a call.

        Raises:
            ServerError: the caller is unknown, or has no role for the method.
        """
        around = self._around
        if around.needs_certificate and not _has_certificate(scope):
            raise CredentialMissingError("a client's certificate")
        caller = EVERYBODY
        if around.tokens is not None:
            keys = [value for name in ("api-key", "x-api-key") for value in headers.getlist(name)]
            caller = around.tokens.bearer(headers.getlist("authorization"), keys)
        check_access(self._operation.method, None, caller)
        return caller


def _has_certificate(scope: Scope) -> bool:
    transport = transport_of(scope)
    connection = None if transport is None else transport.get_extra_info("ssl_object")
    return connection is not None and bool(connection.getpeercert(binary_form=True))
