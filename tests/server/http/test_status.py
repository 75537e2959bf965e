"""Errors as HTTP's callers see them."""

from __future__ import annotations

import msgspec
import pytest

from manyhats.adapters.errors import AdapterInUseError, QuotaExceededError, TaskNotFoundError
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError, QueueFullError, RequestFailedError
from manyhats.server.access.errors import CredentialMissingError
from manyhats.server.http.status import KINDS, param_of, refusal_of
from manyhats.server.service.errors import LoadingError, RequestTooLargeError
from manyhats.server.service.reasons import REASONS


def test_every_reason_has_an_answer_and_no_answer_is_for_none() -> None:
    assert {reason.word for reason in REASONS.values()} == KINDS.keys()


def test_a_field_has_openais_name() -> None:
    refusal = refusal_of(FieldInvalidError("stopping.max_new_tokens", "must be at least 1, not 0"))
    assert msgspec.to_builtins(refusal.body) == {
        "error": {
            "message": "max_tokens: must be at least 1, not 0",
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": "invalid_value",
        }
    }


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.top_p", "top_p"),
        ("stopping.stop_sequences", "stop"),
        ("stopping.stop_token_ids", "stop_token_ids"),
        ("response.top_logprobs", "top_logprobs"),
        ("chat", "messages"),
        ("chat.messages", "messages"),
        ("chat.messages[3].role", "messages[3].role"),
        ("task_id", "model"),
        ("text", "prompt"),
        ("cache_salt", "cache_salt"),
        ("num_sequences", "n"),
        ("prompt[1].ids", "prompt[1]"),
        ("token_ids.ids", "prompt"),
    ],
)
def test_names_of_fields(field: str, param: str) -> None:
    assert param_of(field) == param


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (PromptTooLongError("prompt", 9, 8), 400, "context_length_exceeded", {}),
        (CredentialMissingError(), 401, "invalid_api_key", {"www-authenticate": "Bearer"}),
        (TaskNotFoundError("a", "does not exist"), 404, "model_not_found", {}),
        (AdapterInUseError("a", "is in use"), 409, "adapter_in_use", {"x-should-retry": "false"}),
        (RequestTooLargeError(5), 413, "request_too_large", {"connection": "close"}),
        (QueueFullError(4, 1.25), 429, "rate_limit_exceeded", {"retry-after": "2", "retry-after-ms": "1250"}),
        (LoadingError(), 503, "loading", {"retry-after": "1", "retry-after-ms": "1000"}),
        (QuotaExceededError("max_tasks", "is full"), 507, "quota_exceeded", {"x-should-retry": "false"}),
        (
            QuotaExceededError("max_transfers", "is full", 2.0),
            429,
            "rate_limit_exceeded",
            {"retry-after": "2", "retry-after-ms": "2000"},
        ),
        (RequestFailedError("abc"), 500, "abc", {}),
    ],
)
def test_statuses(error: Exception, status: int, code: str, headers: dict[str, str]) -> None:
    refusal = refusal_of(error)
    assert (refusal.status, refusal.body.error.code, refusal.headers) == (status, code, headers)


def test_an_unexpected_error_keeps_its_text_to_itself() -> None:
    assert "secret" not in refusal_of(ValueError("secret")).body.error.message
