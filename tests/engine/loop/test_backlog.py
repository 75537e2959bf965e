"""Answers that nobody reads: they pause within bounds, go on where they stopped, and end after a limit."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    FieldInvalidError,
    RequestCancelledError,
    StreamUnreadError,
)
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.step import Step
from manyhats.engine.output import FinishReason, StepOutput
from manyhats.engine.request import Request, ResponseOptions, SamplingParams, StoppingParams
from manyhats.engine.residency.lease import Lease
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, random_ids, running_engine, until
from support.harnesses.engine_loop import Loop, prompt


def start(loop: Loop, name: str, request: Request, backlog: Backlog) -> None:
    loop.add(Generation(name, request, Lease(), loop.serving, backlog))


def read(loop: Loop, name: str, backlog: Backlog, first: int, count: int) -> int:
    """Takes so many outputs from the first that was not taken yet on; the next one to take."""
    events = loop.events.get(name, [])[first : first + count]
    for event in events:
        if isinstance(event.payload, StepOutput):
            backlog.take(1)
    return first + len(events)


def test_a_generation_nobody_reads_pauses_and_the_others_go_on(loop: Loop) -> None:
    start(loop, "unread", make_request(prompt(1), new_tokens=40), Backlog(5, 10**9, 60.0))
    for seed in (2, 3):
        loop.generate(str(seed), make_request(prompt(seed), new_tokens=30))
    for _ in range(60):
        loop.step()
    assert loop.token_ids("unread") == loop.decoder.greedy(prompt(1), 5)
    for seed in (2, 3):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed), 30)
    assert loop.steps.has_work
    assert loop.steps.is_idle
    assert not loop.steps.run().is_stuck
    assert loop.steps.scheduler.allocator.num_used == 0


def test_it_takes_no_place_among_those_that_run(tokenizer: Tokenizer) -> None:
    loop = Loop(tokenizer)
    for seed in range(20, 20 + loop.config.max_num_sequences):
        start(loop, str(seed), make_request(prompt(seed), new_tokens=40), Backlog(2, 10**9, 60.0))
    for _ in range(20):
        loop.step()
    loop.generate("late", make_request(prompt(1), new_tokens=8))
    for _ in range(20):
        loop.step()
    assert loop.token_ids("late") == loop.decoder.greedy(prompt(1), 8)


@settings(deadline=None, max_examples=15)
@given(
    max_outputs=st.integers(1, 9),
    takes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=30),
    num_blocks=st.sampled_from([12, 64]),
    temperature=st.sampled_from([0.0, 1.0]),
    prompt_logprobs=st.booleans(),
)
def test_however_it_is_read_the_answer_is_the_same(
    tokenizer: Tokenizer,
    max_outputs: int,
    takes: list[tuple[int, int]],
    num_blocks: int,
    temperature: float,
    prompt_logprobs: bool,
) -> None:
    request = make_request(
        prompt(1, 14),
        new_tokens=25,
        sampling=SamplingParams(temperature=temperature, seed=4, repetition_penalty=1.1),
        response=ResponseOptions(logprobs=True, top_logprobs=2, prompt_logprobs=prompt_logprobs),
    )
    alone = Loop(tokenizer)
    alone.generate("read", request)
    alone.drain()
    loop, backlog = Loop(tokenizer, num_blocks=num_blocks), Backlog(max_outputs, 10**9, 60.0)
    start(loop, "read", request, backlog)
    loop.generate("other", make_request(prompt(2), new_tokens=25))
    taken = 0
    for num_steps, count in takes:
        for _ in range(num_steps):
            loop.step()
        assert len(loop.events.get("read", ())) - taken <= max_outputs
        taken = read(loop, "read", backlog, taken, count)
    while loop.steps.has_work:
        loop.step()
        taken = read(loop, "read", backlog, taken, 99)
    assert [
        event.payload.tokens for event in loop.events["read"] if isinstance(event.payload, StepOutput)
    ] == [event.payload.tokens for event in alone.events["read"] if isinstance(event.payload, StepOutput)]
    assert loop.text("read") == alone.text("read")
    assert [event.is_last for event in loop.events["read"]] == [False] * 24 + [True]
    assert loop.token_ids("other") == loop.decoder.greedy(prompt(2), 25)
    assert loop.steps.scheduler.allocator.num_used == 0


@pytest.mark.parametrize("num_top", [0, 1, 5, 20, 50, 100])
def test_log_probabilities_count_by_their_size(loop: Loop, num_top: int) -> None:
    options = ResponseOptions(logprobs=True, top_logprobs=num_top)
    backlog = Backlog(10**9, 40_000, 60.0)
    start(loop, "unread", make_request(prompt(1), new_tokens=200, response=options), backlog)
    for _ in range(210):
        loop.step()
    outputs = [event.payload for event in loop.events["unread"]]
    sizes = [output.num_bytes for output in outputs if isinstance(output, StepOutput)]
    assert sum(sizes[:-1]) < 40_000 <= sum(sizes)
    assert len(sizes) < 200


def paused(loop: Loop, backlog: Backlog, **request: Any) -> None:
    start(loop, "unread", make_request(prompt(1), **request), backlog)
    for _ in range(12):
        loop.step()
    assert loop.steps.is_idle


def test_after_the_limit_it_ends_with_a_status(loop: Loop) -> None:
    paused(loop, Backlog(4, 10**9, 0.05), new_tokens=40)
    time.sleep(0.06)
    loop.step()
    error = loop.error("unread")
    assert isinstance(error, StreamUnreadError)
    assert "0.05 s" in str(error)
    assert not loop.steps.has_work


def test_a_reader_that_takes_little_is_not_given_up(loop: Loop) -> None:
    backlog = Backlog(4, 10**9, 0.2)
    paused(loop, backlog, new_tokens=40)
    for taken in range(3):
        time.sleep(0.1)
        read(loop, "unread", backlog, taken, 1)
        loop.step()
    assert not any(event.is_last for event in loop.events["unread"])


@pytest.mark.parametrize("how", ["deadline", "time limit", "cancel"])
def test_what_ends_a_request_ends_a_paused_one(loop: Loop, how: str) -> None:
    soon = time.monotonic() + 0.3
    stopping = StoppingParams(
        max_new_tokens=40, ignore_eos=True, time_limit_s=0.3 if how == "time limit" else None
    )
    paused(
        loop,
        Backlog(4, 10**9, 60.0),
        stopping=stopping,
        accepted_s=time.monotonic(),
        deadline_s=soon if how == "deadline" else None,
    )
    if how == "cancel":
        loop.cancel("unread")
        assert isinstance(loop.error("unread"), RequestCancelledError)
    else:
        time.sleep(0.31)
        loop.step()
    if how == "deadline":
        assert isinstance(loop.error("unread"), DeadlineExceededError)
    if how == "time limit":
        assert loop.finish_reason("unread") is FinishReason.TIME_LIMIT
        assert loop.token_ids("unread") == loop.decoder.greedy(prompt(1), 4)
    assert not loop.steps.has_work
    assert loop.steps.is_idle


@pytest.mark.parametrize("limit_s", [0.0, -1.0, float("nan"), float("inf")])
def test_the_limit_is_a_time(limit_s: float) -> None:
    with pytest.raises(FieldInvalidError, match="unread_limit_s"):
        EngineConfig(unread_limit_s=limit_s)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("unread") / "model", seed=13))


TOP = ResponseOptions(logprobs=True, top_logprobs=100)


def long_request(seed: int) -> Request:
    return make_request(random_ids(seed, 9, 300), new_tokens=300, response=TOP)


def num_outputs_alive() -> int:
    gc.collect()
    return sum(type(each) is StepOutput for each in gc.get_objects())


async def is_all_paused(engine: Engine) -> None:
    await until(lambda: engine.loop.step.has_work and engine.loop.step.is_idle)


async def test_unread_streams_hold_little_and_say_the_same_when_they_are_read(model: LoadedModel) -> None:
    # The last stream is read when the others are over, which may take a slow backend a while.
    async with running_engine(model, max_unread_outputs=16, unread_limit_s=300.0) as engine:
        expected = [await collect(engine, long_request(seed)) for seed in range(6)]
        before = num_outputs_alive()
        streams = [engine.generate(long_request(seed)) for seed in range(6)]
        firsts = [await anext(stream) for stream in streams]
        await is_all_paused(engine)
        assert num_outputs_alive() - before <= 6 * 18
        other = await collect(engine, make_request(random_ids(9, 9, 300), new_tokens=100))
        assert len(other.tokens) == 100
        assert num_outputs_alive() - before <= 6 * 18 + 100
        for stream, first, answer in zip(streams, firsts, expected, strict=True):
            outputs = [first, *[output async for output in stream]]
            assert [token for output in outputs for token in output.tokens] == list(answer.tokens)
            assert {output.finish_reason for output in outputs[:-1]} == {None}
            assert len(outputs) < 300  # what waited together came together
            assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_a_paused_stream_keeps_the_engine_neither_busy_nor_from_ending(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    run = Step.run

    def counted(step: Step) -> Any:
        nonlocal turns
        turns += 1
        return run(step)

    async with running_engine(model, max_unread_outputs=4) as engine:
        stream = engine.generate(long_request(1))
        await anext(stream)
        await is_all_paused(engine)
        monkeypatch.setattr(Step, "run", counted)
        heartbeat_s = engine.stats.heartbeat_s
        await asyncio.sleep(0.5)
        assert turns <= 15
        assert engine.stats.heartbeat_s > heartbeat_s
        await asyncio.wait_for(engine.stop(drain_s=0.1), 10)
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass


async def test_a_stream_that_is_never_read_on_ends_after_the_limit_with_what_was_kept(
    model: LoadedModel,
) -> None:
    async with running_engine(model, max_unread_outputs=4, unread_limit_s=0.2) as engine:
        stream = engine.generate(long_request(1))
        await anext(stream)
        await until(lambda: not engine.loop.step.has_work)
        kept = await anext(stream)
        assert (len(kept.tokens), kept.finish_reason) == (3, None)
        with pytest.raises(StreamUnreadError):
            _ = [output async for output in stream]
        assert len((await collect(engine, long_request(2))).tokens) == 300


async def test_a_reader_that_goes_away_ends_a_paused_stream(model: LoadedModel) -> None:
    async with running_engine(model, max_unread_outputs=4) as engine:
        stream = engine.generate(long_request(1))
        await anext(stream)
        await is_all_paused(engine)
        await stream.aclose()
        await until(lambda: not engine.loop.step.has_work)
