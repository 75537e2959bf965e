"""Errors as the statuses and bodies that callers of the HTTP port see."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from msgspec import Struct

from manyhats.adapters import errors as adapter
from manyhats.engine import errors as engine
from manyhats.engine.errors import clipped
from manyhats.server.http.body import WireFieldError
from manyhats.server.service import errors as service
from manyhats.server.service.reasons import is_expected, reason_of

_MAX_MESSAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Kind:
    """How one reason is answered: a status, OpenAI's type of error, and its code; None for the reason's own word."""

    status: int
    type: str
    code: str | None = None


_BAD = Kind(400, "invalid_request_error")
_UNKNOWN = Kind(401, "authentication_error", "invalid_api_key")
_FORBIDDEN = Kind(403, "permission_error")
_NO_MODEL = Kind(404, "invalid_request_error", "model_not_found")
_CONFLICT = Kind(409, "conflict_error")
_LATER = Kind(429, "rate_limit_error", "rate_limit_exceeded")
_FAULT = Kind(500, "server_error")
_UNAVAILABLE = Kind(503, "server_error")
_FULL = Kind(507, "server_error")

# The word of each reason → how it is answered.
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "FIELD_INVALID": Kind(400, "invalid_request_error", "invalid_value"),
        "PROMPT_TOO_LONG": Kind(400, "invalid_request_error", "context_length_exceeded"),
        "NO_TOKEN_ALLOWED": _BAD,
        "TASK_KIND_MISMATCH": _BAD,
        "ADAPTER_INVALID": _BAD,
        "ADAPTER_UNSUPPORTED": _BAD,
        "ADAPTER_UNSAFE": _BAD,
        "ADAPTER_TOO_LARGE": _BAD,
        "ADAPTER_NO_EFFECT": _BAD,
        "DIGEST_MISMATCH": _BAD,
        "CREDENTIAL_MISSING": _UNKNOWN,
        "CREDENTIAL_INVALID": _UNKNOWN,
        "ROLE_MISSING": _FORBIDDEN,
        "TASK_NOT_ALLOWED": _FORBIDDEN,
        "PRIORITY_NOT_ALLOWED": _FORBIDDEN,
        "SOURCE_NOT_ALLOWED": _FORBIDDEN,
        "HOST_NOT_ALLOWED": _FORBIDDEN,
        "TASK_NOT_FOUND": _NO_MODEL,
        "NO_ACTIVE_VERSION": _NO_MODEL,
        "SOURCE_NOT_FOUND": Kind(404, "invalid_request_error"),
        "REQUEST_ID_REUSED": _CONFLICT,
        "ADAPTER_IN_USE": _CONFLICT,
        "BASE_MISMATCH": _CONFLICT,
        "STORE_CONFIG_INVALID": _CONFLICT,
        "REQUEST_TOO_LARGE": Kind(413, "invalid_request_error"),
        "UNSUPPORTED_MEDIA_TYPE": Kind(415, "invalid_request_error"),
        "QUEUE_FULL": _LATER,
        "ADAPTER_CAPACITY": _LATER,
        "STREAM_UNREAD": _LATER,
        "CANCELLED": Kind(499, "server_error"),
        "NUMERICAL_ERROR": _FAULT,
        "DATA_LOSS": _FAULT,
        "INTERNAL": _FAULT,
        "OUT_OF_MEMORY": _UNAVAILABLE,
        "LOADING": _UNAVAILABLE,
        "DRAINING": _UNAVAILABLE,
        "ENGINE_DEAD": _UNAVAILABLE,
        "STORE_UNAVAILABLE": _UNAVAILABLE,
        "SOURCE_UNAVAILABLE": _UNAVAILABLE,
        "DEADLINE_EXCEEDED": Kind(504, "server_error", "timeout"),
        "UPLOAD_STALLED": Kind(504, "server_error"),
        "STORE_FULL": _FULL,
        "QUOTA_EXCEEDED": _FULL,
    }
)

# The API's name of a field → OpenAI's, where they differ; of longer names, the first part that is here counts.
PARAMS: Mapping[str, str] = MappingProxyType(
    {
        "task_id": "model",
        "text": "prompt",
        "text.format": "text.format",  # of a response, which is no prompt
        "token_ids": "prompt",
        "chat": "messages",
        "chat.messages": "messages",
        "chat.tools": "tools",
        "chat.tool_choice": "tool_choice",
        "chat.template_arguments": "chat_template_kwargs",
        "stopping.max_new_tokens": "max_tokens",
        "stopping.min_new_tokens": "min_tokens",
        "stopping.stop_sequences": "stop",
        "num_sequences": "n",
        "texts": "input",
        "inputs": "input",
    }
)
_GROUPS = ("sampling.", "stopping.", "response.", "chat.")
_RETRY_S = 1.0


class ErrorBody(Struct, frozen=True):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct, frozen=True):
    """The body of an answer that is an error, and the last event of a stream that ends in one."""

    error: ErrorBody


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as its caller sees it."""

    status: int
    body: ErrorAnswer
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal_of(error: Exception, name_of: Callable[[str], str] | None = None) -> Refusal:
    """What the caller sees of ``error``; for an unexpected one, only that there was one.

    Args:
        error: why there is no answer.
        name_of: the caller's name of a field, from the service's; by default OpenAI's.
    """
    reason = reason_of(error)
    kind, param = KINDS[reason.word], _param(error, name_of or param_of)
    code = reason.word.lower() if kind.code is None else kind.code
    match error:
        case engine.RequestFailedError() | service.UnexpectedError():
            code = error.error_id
        case adapter.QuotaExceededError(retry_after_s=float()):
            kind, code = _LATER, "rate_limit_exceeded"
    return Refusal(
        kind.status,
        ErrorAnswer(ErrorBody(_message(error, param), kind.type, param, code)),
        _headers(error, kind.status),
    )


def param_of(name: str) -> str:
    """OpenAI's name of a field, from the API's, such as ``chat.messages[1].role``."""
    name = name.removesuffix(".ids")  # a list of token ids is a message of its own there
    parts = re.split(r"(?=[.\[])", name)
    for end in range(len(parts), 0, -1):
        known = PARAMS.get("".join(parts[:end]))
        if known is not None:
            return known + "".join(parts[end:])
    for group in _GROUPS:
        name = name.removeprefix(group)
    return name


def own_param_of(name: str) -> str:
    """The name of a field where requests call theirs as the API does; only the task is a model there."""
    return "model" if name == "task_id" else name.removesuffix(".ids")


def _param(error: Exception, name_of: Callable[[str], str]) -> str | None:
    match error:
        case WireFieldError():
            return error.field
        case engine.RequestError():
            return name_of(error.field)
        case adapter.ArgumentInvalidError():
            return name_of(error.subject)
        case adapter.TaskNotFoundError() | adapter.NoActiveVersionError() | service.TaskKindError():
            return name_of("task_id")
    return None


def _message(error: Exception, param: str | None) -> str:
    """The error's text, in which a field has OpenAI's name."""
    match error:
        case _ if not is_expected(error):
            text = "internal error"
        case adapter.TaskNotFoundError():
            text = f"{error}; GET /v1/models lists those there are"
        case engine.RequestError() | adapter.ArgumentInvalidError():
            text = f"{param}: {error.description}"
        case _:
            text = str(error)
    return clipped(text, _MAX_MESSAGE_BYTES)


def _headers(error: Exception, status: int) -> dict[str, str]:
    match status:
        case 401:
            return {"www-authenticate": "Bearer"}
        case 409 | 507:
            return {"x-should-retry": "false"}
        case 413:
            return {"connection": "close"}
        case 429 | 503:
            seconds = getattr(error, "retry_after_s", None) or _RETRY_S
            return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    return {}
