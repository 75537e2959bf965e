"""Who may call what: one interceptor, and one table from the API's methods to roles."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import grpc
import structlog
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from manyhats.adapters.errors import shown
from manyhats.server.access.tokens import Caller, Role, Scope, TokenFile
from manyhats.server.errors import (
    CredentialInvalidError,
    CredentialMissingError,
    RoleMissingError,
    ServerError,
    TaskNotAllowedError,
)
from manyhats.server.grpc.from_proto import task_of
from manyhats.server.grpc.interceptor import SERVICE_PREFIX
from manyhats.server.grpc.status import status_of

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # no generic type at run time
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]
Check = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method asks of its caller.

    Attributes:
        roles: one of these.
        task: the task that a message names ("" is the base model); None for a message that names none.
    """

    roles: frozenset[Role]
    task: Callable[[Any], str | None]


def _prompted(message: Any) -> str:
    return task_of(message.task_id)


def _named(message: Any) -> str | None:
    return task_of(message.task_id) or None


def _uploaded(message: Any) -> str | None:
    return task_of(message.header.task_id) or None if message.HasField("header") else None


def _nothing(message: Any) -> None:
    return None


_GENERATE = frozenset({Role.GENERATE})
_MANAGE = frozenset({Role.MANAGE})
_ANY = frozenset(Role)

# Methods for everybody: a probe has no token.
OPEN_METHODS = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "Watch", "List"))

# Every other method that may be called at all. Lists of every task show those of the caller's scope.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        f"{SERVICE_PREFIX}GenerationService/Generate": Rule(_GENERATE, _prompted),
        f"{SERVICE_PREFIX}GenerationService/GenerateStream": Rule(_GENERATE, _prompted),
        f"{SERVICE_PREFIX}GenerationService/Score": Rule(_GENERATE, _prompted),
        f"{SERVICE_PREFIX}GenerationService/Tokenize": Rule(_GENERATE, _prompted),
        f"{SERVICE_PREFIX}AdapterService/RegisterAdapter": Rule(_MANAGE, _named),
        f"{SERVICE_PREFIX}AdapterService/UploadAdapter": Rule(_MANAGE, _uploaded),
        f"{SERVICE_PREFIX}AdapterService/ActivateAdapter": Rule(_MANAGE, _named),
        f"{SERVICE_PREFIX}AdapterService/DeleteAdapter": Rule(_MANAGE, _named),
        f"{SERVICE_PREFIX}AdapterService/GetAdapter": Rule(_ANY, _named),
        f"{SERVICE_PREFIX}AdapterService/ListAdapters": Rule(_ANY, _named),
        f"{SERVICE_PREFIX}ServerService/GetServerInfo": Rule(_ANY, _nothing),
        f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": Rule(_ANY, _nothing),
    }
)
_NOBODY = Rule(frozenset(), _nothing)


class Authorizer:
    """Knows callers by the tokens of a file."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    def caller(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """Who makes a call, by its metadata.

        Raises:
            CredentialMissingError, CredentialInvalidError: the caller is unknown.
        """
        values = [value for key, value in metadata or () if key == "authorization"]
        if not values:
            raise CredentialMissingError
        scheme, _, token = str(values[0]).partition(" ")
        caller = self._tokens.caller(token.strip())
        if caller is None or len(values) > 1 or scheme.lower() != "bearer":
            raise CredentialInvalidError
        return caller

    def scope(self, context: Context) -> Scope:
        """The tasks that the caller of a call reaches."""
        return self.caller(context.invocation_metadata()).scope


def everything(context: Context) -> Scope:
    """What callers reach where there are no tokens."""
    return Scope()


class AuthorizationInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that their caller may not make; inside ``CallInterceptor``, which answers for it.

    Credential and role are checked before a byte of the message is read, its task before it is handled.
    """

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """The method's handler behind its checks, or one that refuses."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method in OPEN_METHODS:
            return handler
        rule = RULES.get(method, _NOBODY)
        try:
            caller = self._authorizer.caller(handler_call_details.invocation_metadata)
            if not caller.roles & rule.roles:
                raise RoleMissingError(
                    method.rpartition("/")[2], [role.value for role in Role if role in rule.roles]
                )
        except ServerError as error:
            return _refusing(error, method)
        return _checking(handler, caller, rule)


def _refusing(error: ServerError, method: str) -> Handler:
    # Whatever the method takes, this takes a stream, and so reads nothing of it.
    async def refuse(requests: object, context: Context) -> None:
        structlog.contextvars.bind_contextvars(peer=context.peer())
        if method.startswith(SERVICE_PREFIX):
            raise error
        await context.abort_with_status(rpc_status.to_status(status_of(error, error_id="")))

    return grpc.stream_unary_rpc_method_handler(refuse)


def _checking(handler: Any, caller: Caller, rule: Rule) -> Handler:
    def check(message: Any) -> None:
        structlog.contextvars.bind_contextvars(caller=caller.name)
        task = rule.task(message)
        if task is not None and not caller.scope.reaches(task):
            raise TaskNotAllowedError(shown(task))

    async def unary(request: Any, context: Context) -> Any:
        check(request)
        return await handler.unary_unary(request, context)

    def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        check(request)
        responses: AsyncIterator[Any] = handler.unary_stream(request, context)
        return responses

    async def upload(requests: AsyncIterator[Any], context: Context) -> Any:
        return await handler.stream_unary(_checked(requests, check), context)

    serializers = (handler.request_deserializer, handler.response_serializer)
    match handler.request_streaming, handler.response_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler(unary, *serializers)
        case False, True:
            return grpc.unary_stream_rpc_method_handler(stream, *serializers)
        case True, False:
            return grpc.stream_unary_rpc_method_handler(upload, *serializers)
    checked: Handler = handler  # reflection, whose messages name no task
    return checked


async def _checked(requests: AsyncIterator[Any], check: Check) -> AsyncIterator[Any]:
    async for request in requests:
        check(request)
        yield request
