"""A job's stream: what its reader takes at a time, and what a step's outputs are joined to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from manyhats.engine.errors import EngineError, RequestCancelledError
from manyhats.engine.loop.job import Event
from manyhats.engine.loop.streams import Stream, Streams
from manyhats.engine.output import FinishReason, StepOutput, TokenOutput, Usage, joined


def stream_of(*payloads: Any) -> Stream:
    """A stream whose last payload ends it, if it is an error or says ``last``."""
    stream = Stream("1", lambda: None)
    for payload in payloads:
        stream.put(Event("1", payload, isinstance(payload, EngineError) or payload == "last"))
    return stream


def output(text: str, *ids: int, reason: FinishReason | None = None, time_s: float = 0.0) -> StepOutput:
    tokens = tuple(TokenOutput(each, str(each)) for each in ids)
    prompt = (TokenOutput(99, "p"),) if time_s == 0.0 else ()
    return StepOutput(text, tokens, prompt, reason, Usage(generated_tokens=len(ids)), time_s)


async def test_all_that_has_come_is_taken_at_once_up_to_a_limit() -> None:
    stream = stream_of("a", "b", "c", "last")
    assert await stream.take(1) == ["a"]
    assert not stream.is_over
    assert await stream.take() == ["b", "c", "last"]
    assert stream.is_over


async def test_a_reader_waits_for_the_first_output_and_is_woken_once_for_several() -> None:
    stream = stream_of()
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not taking.done()
    for payload in ("a", "last"):
        stream.put(Event("1", payload, payload == "last"))
    assert await taking == ["a", "last"]


async def test_an_error_comes_after_the_outputs_before_it() -> None:
    stream = stream_of("a", "b", RequestCancelledError("gone"))
    assert await stream.take() == ["a", "b"]
    assert not stream.is_over
    with pytest.raises(RequestCancelledError, match="gone"):
        await stream.take()
    assert stream.is_over


async def test_what_comes_after_a_reader_gave_up_waiting_is_there_for_the_next() -> None:
    stream = stream_of()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.take(), 0.001)
    stream.put(Event("1", "last", True))
    assert await stream.take() == ["last"]


def test_joined_outputs_say_together_what_each_said() -> None:
    parts = [
        output("a", 1),
        output("", 2, 3, time_s=1.0),
        output("bc", 4, time_s=2.0, reason=FinishReason.LENGTH),
    ]
    whole = joined(parts)
    assert whole.text == "abc"
    assert [token.id for token in whole.tokens] == [1, 2, 3, 4]
    assert whole.prompt_tokens == parts[0].prompt_tokens
    assert (whole.finish_reason, whole.usage, whole.time_s) == (FinishReason.LENGTH, parts[2].usage, 2.0)
    assert joined(parts[:1]) is parts[0]


async def test_what_an_ended_job_holds_is_released_once_no_step_can_use_it() -> None:
    streams, released = Streams(), []
    streams.attach(asyncio.get_running_loop())
    stream = streams.open("1", lambda: released.append("1"))
    answer = streams.expect("2")
    streams.publish([Event("1", "last", True), Event("2", "logits", True)], is_in_flight=True)
    assert await stream.take() == ["last"]
    assert not released
    assert not answer.done()
    streams.publish([], is_in_flight=True)  # a later step, which cannot name them
    assert released == ["1"]
    assert answer.result(0) == "logits"


@pytest.mark.parametrize("is_in_flight", [False, True])
async def test_nothing_is_held_beyond_the_engine_s_end(is_in_flight: bool) -> None:
    streams, released = Streams(), []
    streams.attach(asyncio.get_running_loop())
    for name in ("1", "2"):
        streams.open(name, lambda name=name: released.append(name))  # type: ignore[misc]
    answer = streams.expect("3")
    streams.publish([Event("1", "last", True), Event("3", "logits", True)], is_in_flight=is_in_flight)
    streams.end("gone")
    await asyncio.sleep(0)
    assert sorted(released) == ["1", "2"]
    assert answer.result(0) == "logits"
