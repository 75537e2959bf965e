"""The table of reasons: every error that a call can end with has its row."""

from __future__ import annotations

import inspect
from typing import TypeVar

from manyhats.adapters import errors as adapter_errors
from manyhats.engine import errors as engine_errors
from manyhats.server.access import errors as access_errors
from manyhats.server.service import errors as service_errors
from manyhats.server.service.reasons import REASONS

E = TypeVar("E", bound=Exception)


def _leaves(module: object, base: type[E]) -> list[type[E]]:
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, base)]
    return [kind for kind in kinds if not kind.__subclasses__()]


def test_every_error_of_an_adapter_has_a_row_with_its_own_reason() -> None:
    for kind in _leaves(adapter_errors, adapter_errors.AdapterError):
        row = next((REASONS[each] for each in kind.__mro__ if each in REASONS), None)
        assert row is not None, kind
        assert row.word == kind.reason


def test_every_error_of_the_engine_that_a_request_can_meet_has_a_row() -> None:
    at_start_only = {engine_errors.ModelError}
    for kind in set(_leaves(engine_errors, engine_errors.EngineError)) - at_start_only:
        assert any(each in REASONS for each in kind.__mro__), kind


def test_every_error_of_the_server_that_a_call_can_meet_has_a_row() -> None:
    at_start_only = {access_errors.ConfigError, service_errors.AddressError}
    kinds = {
        *_leaves(access_errors, access_errors.ServerError),
        *_leaves(service_errors, access_errors.ServerError),
    }
    for kind in kinds - at_start_only:
        assert any(each in REASONS for each in kind.__mro__), kind


def test_a_reason_has_one_code() -> None:
    reasons = set(REASONS.values())
    assert len({reason.word for reason in reasons}) == len(reasons)
