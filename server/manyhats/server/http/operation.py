"""What the HTTP port's calls are: one row for each, of which its routes and its description are made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from manyhats.server.http.status import param_of

Body = TypeVar("Body")

Handle = Callable[[Any, Body], Awaitable[Any]]
"""Makes the answer of an ``HttpCall``: what is to be sent as JSON, bytes, or an async generator of events."""

# Words of reasons (``service/reasons.py``): why calls fail.
OF_EVERY_CALL = frozenset(
    {
        *("CREDENTIAL_MISSING", "CREDENTIAL_INVALID", "ROLE_MISSING", "HOST_NOT_ALLOWED"),
        *("FIELD_INVALID", "QUEUE_FULL", "LOADING", "DRAINING", "ENGINE_DEAD", "INTERNAL"),
        "OUT_OF_MEMORY",
    }
)
OF_A_BODY = frozenset({"REQUEST_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE", "UPLOAD_STALLED"})
OF_A_TASK = frozenset({"TASK_NOT_ALLOWED", "TASK_NOT_FOUND", "NO_ACTIVE_VERSION", "STORE_UNAVAILABLE"})
OF_TEXTS = OF_A_TASK | {"PROMPT_TOO_LONG", "ADAPTER_INVALID", "DATA_LOSS"}
"""Of calls that use a task's tokenizer."""
OF_RUNS = OF_TEXTS | {
    *(
        "PRIORITY_NOT_ALLOWED",
        "ADAPTER_UNSUPPORTED",
        "ADAPTER_CAPACITY",
        "SOURCE_UNAVAILABLE",
        "STREAM_UNREAD",
    ),
    *("TASK_KIND_MISMATCH", "NO_TOKEN_ALLOWED", "NUMERICAL_ERROR", "DEADLINE_EXCEEDED"),
}
"""Of calls that run a task on the engine."""
OF_AN_UPLOAD = frozenset(
    {
        *(
            "TASK_NOT_ALLOWED",
            "ADAPTER_INVALID",
            "ADAPTER_UNSUPPORTED",
            "ADAPTER_UNSAFE",
            "ADAPTER_TOO_LARGE",
        ),
        *("ADAPTER_NO_EFFECT", "DIGEST_MISMATCH", "BASE_MISMATCH", "REQUEST_ID_REUSED"),
        *("QUOTA_EXCEEDED", "STORE_FULL", "STORE_UNAVAILABLE"),
    }
)
OF_A_REGISTRATION = OF_AN_UPLOAD | {"SOURCE_NOT_ALLOWED", "SOURCE_NOT_FOUND", "SOURCE_UNAVAILABLE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[Body]):
    """One kind of call.

    Attributes:
        verb, path: its route; the path as Starlette writes it.
        method: the API's name for it, in rules, metrics and logs.
        summary: what it does, in a line.
        handle: makes its answer, and says of what types that is.
        body: what is read: a struct of JSON, or ``ByteStream`` for a form with files; None for no body.
        options: of a form: the struct in its first field.
        name_of: how its fields are called in errors, by the service's names.
        query: name of each parameter of its address → what it is.
        headers: name of each header that it reads, besides those of every call → what it is.
        errors: words of the reasons for which it fails, besides those of every call and of every body.
    """

    verb: str
    path: str
    method: str
    summary: str
    handle: Handle[Body]
    body: type[Body] | None = None
    options: type[Any] | None = None
    name_of: Callable[[str], str] = param_of
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    errors: frozenset[str] = frozenset()

    @property
    def all_errors(self) -> frozenset[str]:
        """Words of all reasons for which it fails."""
        return self.errors | OF_EVERY_CALL | (frozenset() if self.body is None else OF_A_BODY)

    @property
    def answers(self) -> tuple[list[Any], list[Any]]:
        """The types of whole answers and those of a stream's events, by what ``handle`` declares to return."""
        given = get_type_hints(self.handle)["return"]
        kinds = get_args(given) if isinstance(given, UnionType) else (given,)
        streams = [kind for kind in kinds if get_origin(kind) is AsyncGenerator]
        return [kind for kind in kinds if kind not in streams], [get_args(kind)[0] for kind in streams]
