"""A call, whatever it came through: what its message may name, what it is counted as, and what is told of bugs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from manyhats.engine.errors import DrainingError, FieldInvalidError, QueueFullError
from manyhats.server.access.errors import TaskNotAllowedError
from manyhats.server.access.tokens import EVERYBODY, Caller, Role, Scope
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.call import MAX_REQUEST_ID_LENGTH, Call, Calls, task_of
from manyhats.server.service.errors import LoadingError, UnexpectedError
from manyhats.server.service.gate import Gate
from support.fakes.server import EchoEngine, MemoryStore, make_backend


def make_call(method: str = "Generate", caller: Caller = EVERYBODY, **fields: Any) -> Call:
    return Call(method=method, caller=caller, **fields)


class Observer:
    """Calls on fakes, and what is counted of them."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.gate, self.metrics = Gate(heartbeat_limit_s=5.0), Metrics(max_task_labels=10)
        if is_open:
            self.gate.open(make_backend(EchoEngine(), MemoryStore()))
        self.observed = Calls(self.gate, self.metrics).observed

    def counted(self) -> list[tuple[str, str, str]]:
        return [
            (sample.labels["method"], sample.labels["task"], sample.labels["code"])
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "manyhats_requests_total"
        ]


@given(st.text(max_size=10))
def test_task_of_a_name_is_what_stands_before_the_version(task_id: str) -> None:
    assert task_of(f"{task_id}@3") == task_id.partition("@")[0]


@given(st.text(max_size=200))
def test_any_request_id_is_taken_or_refused_by_its_field(request_id: str) -> None:
    call = make_call()
    try:
        call.identify(request_id)
    except FieldInvalidError as error:
        assert error.field == "request_id"  # noqa: PT017
        assert len(request_id) > MAX_REQUEST_ID_LENGTH or not request_id.isprintable()
        return
    assert call.request_id == (request_id or call.id)


def test_ids_of_calls_differ_though_callers_repeat_theirs() -> None:
    calls = [make_call() for _ in range(100)]
    for call in calls:
        call.identify("mine")
    assert len({call.id for call in calls}) == 100
    assert {call.request_id for call in calls} == {"mine"}


def test_a_call_is_counted_by_what_it_names_first_and_checked_by_all_it_names() -> None:
    observer = Observer()
    caller = Caller(name="ci", roles=frozenset(Role), scope=Scope(("mine",)))
    call = make_call("UploadAdapter", caller)
    call.names("mine@2")
    call.names("")
    with pytest.raises(TaskNotAllowedError, match="hats"), observer.observed(call):
        call.names("hats@1")
    assert call.name == "mine@2"
    assert [code for _, _, code in observer.counted()] == ["PERMISSION_DENIED"]


async def test_a_call_ends_as_cancelled_or_late() -> None:
    observer = Observer()
    for deadline_s in (None, time.monotonic() + 60, time.monotonic() + 0.01):
        with pytest.raises(asyncio.CancelledError), observer.observed(make_call(deadline_s=deadline_s)):
            raise asyncio.CancelledError
    codes = [code for _, _, code in observer.counted()]
    assert sorted(codes) == ["CANCELLED", "DEADLINE_EXCEEDED"]
    assert observer.gate.num_running == 0


def test_what_nobody_raised_on_purpose_is_in_the_log_and_not_in_the_answer() -> None:
    observer = Observer()
    with capture_logs() as logs, pytest.raises(UnexpectedError) as caught, observer.observed(make_call()):
        raise KeyError("/etc/secret")
    assert "secret" not in str(caught.value)
    (unexpected,) = (line for line in logs if line["event"] == "unexpected error")
    assert unexpected["error_id"] == caught.value.error_id
    assert isinstance(unexpected["exc_info"], KeyError)
    assert observer.counted() == [("Generate", "", "INTERNAL")]


def test_what_was_raised_on_purpose_goes_on_as_it_is() -> None:
    error = QueueFullError(9, 1.5)
    observer = Observer()
    with capture_logs() as logs, pytest.raises(QueueFullError) as caught, observer.observed(make_call()):
        raise error
    assert caught.value is error
    assert [line["event"] for line in logs] == ["call"]
    assert observer.counted() == [("Generate", "", "RESOURCE_EXHAUSTED")]


def test_a_call_that_is_not_admitted_is_counted() -> None:
    observer = Observer(is_open=False)
    with pytest.raises(LoadingError), observer.observed(make_call()):
        raise AssertionError
    observer.gate.drain()
    with pytest.raises(DrainingError), observer.observed(make_call()):
        raise AssertionError
    assert observer.counted() == [("Generate", "", "UNAVAILABLE")]
