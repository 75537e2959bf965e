"""Calls that are tried again by themselves, by both clients over a real port."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from manyhats.client import (
    AsyncClient,
    Client,
    DeadlineError,
    InvalidRequestError,
    ManyhatsError,
    QueueFullError,
    ResourceExhaustedError,
    UnavailableError,
)
from manyhats.client.retries import SERVICE_CONFIG
from manyhats.v1 import adapter_pb2, encoding_pb2, generation_pb2, server_pb2
from support.fakes.client import TEXT, FakeServer, make_status

CODE = grpc.StatusCode
MAX_ATTEMPTS = 4
Do = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def do(request: pytest.FixtureRequest, fake: FakeServer) -> Do:
    """Calls a method of either client, and reads its stream if it is one."""

    def of_sync(name: str, *args: Any, retries: bool = True, **options: Any) -> Any:
        with Client(fake.target, retries=retries) as client:
            answer = getattr(client, name)(*args, **options)
            return answer.result() if hasattr(answer, "result") else answer

    def of_async(name: str, *args: Any, retries: bool = True, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(fake.target, retries=retries) as client:
                answer = getattr(client, name)(*args, **options)
                return await (answer.result() if hasattr(answer, "result") else answer)

        return asyncio.run(run())

    return of_sync if request.param == "sync" else of_async


def full(retry_after_s: float | None) -> Any:
    return make_status(CODE.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after_s=retry_after_s)


def make_directory(path: Path) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


@pytest.mark.parametrize("name", ["generate", "generate_stream"])
def test_a_refused_call_is_tried_again_when_the_server_says(fake: FakeServer, do: Do, name: str) -> None:
    fake.status, fake.num_failures = full(0.15), 2
    began_s = time.monotonic()
    assert do(name, "hi", task_id="sql").text == TEXT
    assert 0.3 <= time.monotonic() - began_s < 3.0
    assert len(fake.requests) == 3


def test_a_server_that_names_no_time_is_asked_again_soon(fake: FakeServer, do: Do) -> None:
    fake.status, fake.num_failures = make_status(CODE.UNAVAILABLE, "somewhere between"), 2
    began_s = time.monotonic()
    assert do("generate", "hi").text == TEXT
    assert 0.4 <= time.monotonic() - began_s < 3.0  # 0.2 s and 0.4 s, a fifth more or less


def test_what_waiting_does_not_help_is_asked_once(fake: FakeServer, do: Do) -> None:
    fake.status, fake.num_failures = full(None), 1
    with pytest.raises(QueueFullError):
        do("generate", "hi")
    assert len(fake.requests) == 1


def test_no_call_is_tried_more_than_four_times(fake: FakeServer, do: Do) -> None:
    fake.status = full(0.01)
    with pytest.raises(QueueFullError) as caught:
        do("generate", "hi")
    assert caught.value.retry_after_s == 0.01
    assert len(fake.requests) == MAX_ATTEMPTS


def test_other_errors_are_not_tried_again(fake: FakeServer, do: Do) -> None:
    fake.status = make_status(CODE.INVALID_ARGUMENT, "no", reason="FIELD_INVALID", retry_after_s=0.01)
    with pytest.raises(InvalidRequestError):
        do("generate", "hi")
    assert len(fake.requests) == 1


def test_a_deadline_is_for_all_attempts_together(fake: FakeServer, do: Do) -> None:
    fake.status = full(0.6)
    began_s = time.monotonic()
    with pytest.raises(DeadlineError):
        do("generate", "hi", timeout_s=1.0)
    assert 0.9 <= time.monotonic() - began_s < 1.8
    assert len(fake.requests) <= 2


def test_a_stream_that_has_begun_is_not_tried_again(fake: FakeServer, do: Do) -> None:
    fake.status, fake.fail_stream_after = full(0.01), 2
    with pytest.raises(QueueFullError):
        do("generate_stream", "hi")
    assert len(fake.requests) == 1


def test_retries_can_be_turned_off(fake: FakeServer, do: Do) -> None:
    fake.status = full(0.01)
    with pytest.raises(QueueFullError):
        do("generate", "hi", retries=False)
    assert len(fake.requests) == 1


def test_a_registration_is_tried_again_under_one_request_id(fake: FakeServer, do: Do) -> None:
    fake.status = make_status(CODE.UNAVAILABLE, "gone", reason="STORE_UNAVAILABLE", retry_after_s=0.01)
    fake.num_failures = 2
    assert do("register_adapter", "sql", "/a").created
    first, *again = [request.request_id for request in fake.requests]  # type: ignore[attr-defined]
    assert first
    assert again == [first, first]
    do("register_adapter", "sql", "/a")
    assert fake.last_request.request_id not in ("", first)
    do("register_adapter", "sql", "/a", request_id="mine")
    assert fake.last_request.request_id == "mine"


def test_an_upload_is_left_to_its_caller(fake: FakeServer, do: Do, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "sql")
    for status in (full(0.01), make_status(CODE.UNAVAILABLE, "gone", retry_after_s=0.01)):
        fake.requests.clear()
        fake.status, fake.num_failures = status, 1
        with pytest.raises(ManyhatsError):
            do("upload_adapter", "sql", directory)
        assert len(fake.requests) == 1
        assert do("upload_adapter", "sql", directory).created


def test_a_check_that_stores_nothing_has_no_request_id(fake: FakeServer, do: Do) -> None:
    do("register_adapter", "sql", "/a", validate_only=True)
    assert fake.last_request.request_id == ""


@pytest.mark.parametrize("name", ["activate_adapter", "pin_adapter", "unpin_adapter", "delete_adapter"])
def test_a_change_that_may_have_happened_is_not_made_again_but_a_refused_one_is(
    fake: FakeServer, do: Do, name: str
) -> None:
    fake.status = make_status(CODE.UNAVAILABLE, "gone", reason="STORE_UNAVAILABLE", retry_after_s=0.01)
    with pytest.raises(UnavailableError):
        do(name, "sql@1")
    assert len(fake.requests) == 1
    fake.requests.clear()
    fake.status, fake.num_failures = full(0.01), 1
    do(name, "sql@1")
    assert len(fake.requests) == 2


def test_many_refusals_do_not_end_trying_again(fake: FakeServer) -> None:
    fake.status = full(0.001)
    with Client(fake.target) as client:
        for _ in range(20):
            with pytest.raises(ResourceExhaustedError):
                client.generate("hi")
        fake.requests.clear()
        fake.num_failures = MAX_ATTEMPTS - 1
        assert client.generate("hi").text == TEXT


def test_a_server_that_is_not_there_is_asked_for_in_vain_and_soon() -> None:
    began_s = time.monotonic()
    with Client("127.0.0.1:1") as client, pytest.raises(ManyhatsError, match="cannot reach the server"):
        client.generate("hi")
    assert 1.0 < time.monotonic() - began_s < 4.0


def test_the_methods_that_are_named_exist() -> None:
    services = {
        service.full_name: service
        for module in (adapter_pb2, encoding_pb2, generation_pb2, server_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    named = [name for each in json.loads(SERVICE_CONFIG)["methodConfig"] for name in each["name"]]
    assert {name["service"] for name in named} == set(services)
    for name in named:
        assert name.get("method") is None or name["method"] in services[name["service"]].methods_by_name


def test_a_large_request_is_tried_again_too(fake: FakeServer, do: Do) -> None:
    fake.status, fake.num_failures = full(0.01), 2
    assert do("generate", "x" * 3_000_000).text == TEXT
    assert len(fake.requests) == 3
