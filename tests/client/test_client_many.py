"""Many prompts at a time: order, concurrency, repeats, errors, progress, through both clients."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from manyhats.client import (
    AsyncClient,
    Client,
    Credentials,
    DeadlineError,
    Generation,
    InvalidRequestError,
    QueueFullError,
    ResourceExhaustedError,
    UnavailableError,
    many,
)
from support.fakes import client as fakes
from support.fakes.client import FakeServer, make_status

CODE = grpc.StatusCode
PROMPTS = [f"prompt {index}" for index in range(40)]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Any:
    """``generate_many`` of either client, by the server's address."""

    def of_sync(target: str, *args: Any, **options: Any) -> Any:
        with Client(target) as client:
            return client.generate_many(*args, **options)

    def of_async(target: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(target) as client:
                return await client.generate_many(*args, **options)

        return asyncio.run(run())

    return of_sync if request.param == "sync" else of_async


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "_FIRST_DELAY_S", 0.01)


def queue_full(retry_after_s: float) -> Any:
    return make_status(CODE.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after_s=retry_after_s)


def test_answers_come_in_order_and_as_many_run_as_may(fake: FakeServer, ask: Any) -> None:
    fake.echoes, fake.delay_s = True, 0.01
    answers = ask(fake.target, PROMPTS, concurrency=5, max_new_tokens=3)
    assert [answer.text.rpartition(" ")[0] for answer in answers] == PROMPTS
    assert fake.most_running == 5
    assert {request.stopping.max_new_tokens for request in fake.requests} == {3}


def test_one_task_for_all_or_one_for_each(fake: FakeServer, ask: Any) -> None:
    assert {answer.adapter.task_id for answer in ask(fake.target, PROMPTS, task_id="sql")} == {"sql"}
    answers = ask(fake.target, iter(["a", "b", "c"]), task_id=["sql", "", "tldr@1"])
    assert [answer.adapter and answer.adapter.task_id for answer in answers] == ["sql", None, "tldr@1"]
    with pytest.raises(InvalidRequestError, match="one for each of 2 prompts, not 1"):
        ask(fake.target, ["a", "b"], task_id=["sql"])
    with pytest.raises(InvalidRequestError, match="that of prompt 1 is nan"):
        ask(fake.target, ["a", "b"], task_id=["sql", float("nan")])
    with pytest.raises(TypeError, match="several, not one text"):
        ask(fake.target, "a")


def test_no_prompts_no_requests(fake: FakeServer, ask: Any) -> None:
    assert ask(fake.target, []) == []
    assert fake.requests == []


@pytest.mark.parametrize("reason", ["QUEUE_FULL", "OUT_OF_MEMORY"])
def test_a_refused_prompt_comes_again_when_the_server_says(fake: FakeServer, ask: Any, reason: str) -> None:
    fake.status = make_status(CODE.RESOURCE_EXHAUSTED, "full", reason=reason, retry_after_s=0.3)
    fake.num_failures = 2
    began_s = time.monotonic()
    assert len(ask(fake.target, ["a"])) == 1
    assert time.monotonic() - began_s >= 0.6
    assert len(fake.requests) == 3


def test_what_the_server_says_no_time_for_is_not_repeated(fake: FakeServer, ask: Any) -> None:
    fake.status = make_status(CODE.RESOURCE_EXHAUSTED, "full", reason="STORE_FULL")
    with pytest.raises(ResourceExhaustedError):
        ask(fake.target, ["a"])
    assert len(fake.requests) == 1


def test_the_first_error_ends_the_call_and_says_where_it_is(fake: FakeServer, ask: Any) -> None:
    fake.echoes = True
    prompts: list[Any] = [*PROMPTS[:7], 3.5, *PROMPTS]
    with pytest.raises(InvalidRequestError, match="not float") as caught:
        ask(fake.target, prompts, concurrency=1)
    assert caught.value.__notes__ == ["prompts[7]"]
    assert len(fake.requests) == 7


def test_errors_may_stand_in_the_place_of_answers(fake: FakeServer, ask: Any) -> None:
    fake.echoes = True
    answers = ask(fake.target, ["a", 3.5, "b"], on_error="return")
    assert [type(answer) for answer in answers] == [Generation, InvalidRequestError, Generation]


def test_the_time_of_a_prompt_includes_its_repeats(fake: FakeServer, ask: Any) -> None:
    fake.status = queue_full(0.1)
    began_s = time.monotonic()
    with pytest.raises(
        DeadlineError, match=r"within 0\.5 s, and the last attempt was refused: full"
    ) as caught:
        ask(fake.target, ["a"], timeout_s=0.5)
    assert isinstance(caught.value.__cause__, QueueFullError)
    assert 0.3 < time.monotonic() - began_s < 2
    assert len(fake.requests) > 2


def test_the_time_of_a_running_prompt_ends_it(fake: FakeServer, ask: Any) -> None:
    fake.delay_s = 0.5
    with pytest.raises(DeadlineError):
        ask(fake.target, ["a"], timeout_s=0.1)
    fake.delay_s = 0.0
    with Client(fake.target, timeout_s=0.1) as client:
        fake.delay_s = 0.5
        with pytest.raises(DeadlineError):
            client.generate_many(["a"])


def test_a_server_that_stays_away_is_given_up(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "UNAVAILABLE_LIMIT_S", 0.5)
    began_s = time.monotonic()
    answers = ask("127.0.0.1:1", PROMPTS, on_error="return", concurrency=2)
    assert {type(answer) for answer in answers} == {UnavailableError}
    assert time.monotonic() - began_s < 10  # once for all prompts, not for each


def test_a_full_queue_is_no_outage(fake: FakeServer, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "UNAVAILABLE_LIMIT_S", 0.05)
    fake.status, fake.num_failures = queue_full(0.1), 4
    assert len(ask(fake.target, ["a"])) == 1


def test_progress_tells_how_many_have_ended(fake: FakeServer, ask: Any) -> None:
    told: list[tuple[int, int]] = []
    ask(fake.target, PROMPTS, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, len(PROMPTS)) for done in range(len(PROMPTS) + 1)]


def test_an_error_of_the_callers_progress_comes_back_as_it_is(fake: FakeServer, ask: Any) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(fake.target, PROMPTS, progress=fail)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"concurrency": 0}, "concurrency"), ({"on_error": "ignore"}, "on_error")],
)
def test_bad_options_are_named(fake: FakeServer, ask: Any, options: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        ask(fake.target, PROMPTS, **options)
    with pytest.raises(TypeError, match="tempature"):
        ask(fake.target, PROMPTS, tempature=1)
    assert fake.requests == []


def test_a_client_on_a_channel_of_the_callers_is_refused(fake: FakeServer) -> None:
    with (
        grpc.insecure_channel(fake.target) as channel,
        Client(channel=channel) as client,
        pytest.raises(InvalidRequestError, match="give the client a target instead"),
    ):
        client.generate_many(PROMPTS)


def test_the_token_goes_along(fake: FakeServer) -> None:
    with Client(fake.target, credentials=Credentials(token="secret")) as client:
        client.generate_many(PROMPTS)
    assert set(fake.authorizations) == {"Bearer secret"}


async def test_the_blocking_client_works_where_a_loop_runs(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        assert len(client.generate_many(PROMPTS)) == len(PROMPTS)


def test_an_interrupt_cancels_what_runs(fake: FakeServer) -> None:
    fake.delay_s = 4
    threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    began_s = time.monotonic()
    with Client(fake.target) as client, pytest.raises(KeyboardInterrupt):
        client.generate_many(PROMPTS, concurrency=4)
    assert time.monotonic() - began_s < 3
    assert len(fake.requests) == 4


@contextmanager
def own_process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A fake server that can be killed; it echoes."""
    root = Path(fakes.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    process = subprocess.Popen([sys.executable, fakes.__file__, str(port)], env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def test_ten_thousand_prompts_outlive_a_server_that_is_killed_and_comes_back() -> None:
    prompts, port, concurrency = [str(index) for index in range(10_000)], free_port(), 6
    half_done = asyncio.Event()

    def note(done: int, total: int) -> None:
        if 2 * done >= total:
            half_done.set()

    async def kill() -> None:
        await half_done.wait()
        process.kill()
        process.wait()
        await asyncio.sleep(0.5)

    with own_process(port) as process:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            await client.wait_ready()
            killing = asyncio.create_task(kill())
            asking = asyncio.create_task(
                client.generate_many(prompts, concurrency=concurrency, progress=note)
            )
            await killing
            assert not asking.done()
            with own_process(port):
                answers = await asking
    told = [answer.text.split() for answer in answers]
    assert [prompt for prompt, _ in told] == prompts
    assert 1 < max(int(num_running) for _, num_running in told) <= concurrency
