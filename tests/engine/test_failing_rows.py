"""Whatever one request fails with ends that request alone, and a step that fails ends its requests alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from manyhats.engine import engine as engine_module
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import EngineDeadError, EngineError, NoTokenAllowedError, RequestFailedError
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.output import ScoreOutput
from manyhats.engine.request import ResponseOptions, SamplingParams, ScoreRequest
from manyhats.engine.residency.lease import Lease
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import default_model
from support.harnesses.engine import (
    collect,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
    until,
)
from support.harnesses.engine_loop import POISON, Loop, prompt, score_request
from support.harnesses.sampling import mask_of


class BrokenError(Exception):
    """What no part of the engine expects."""


def failing(kind: type[Any], method: str, at_call: int) -> type[Any]:
    """A job whose method raises at one of its calls."""
    calls = iter(range(1, 1000))

    def fails(self: Any, *arguments: Any) -> Any:
        if next(calls) == at_call:
            raise BrokenError(method)
        return getattr(kind, method)(self, *arguments)

    return type(f"Failing{kind.__name__}", (kind,), {method: fails})


GENERATION_STAGES = [
    (stage, at_call)
    for stage in ("next", "wants", "_sampling_row", "take", "_take_token", "_output")
    for at_call in (1, 2, 5)
]


@pytest.mark.parametrize(("stage", "at_call"), GENERATION_STAGES)
def test_a_generation_that_fails_anywhere_ends_alone(loop: Loop, stage: str, at_call: int) -> None:
    sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    options = ResponseOptions(logprobs=True, prompt_logprobs=True)
    loop.generate("0", make_request(prompt(0), new_tokens=9))
    kind = failing(Generation, stage, at_call)
    request = make_request(prompt(1, 20), new_tokens=9, response=options)
    loop.add(kind("bad", request, Lease(), loop.serving))
    loop.generate("2", make_request(prompt(2), new_tokens=9, sampling=sampled))
    loop.score("score", score_request(prompt(3), [[7, 8], [9]]))
    loop.drain()
    error = loop.error("bad")
    assert isinstance(error, RequestFailedError)
    assert isinstance(error.__cause__, BrokenError)
    assert loop.token_ids("0") == loop.decoder.greedy(prompt(0), 9)
    assert isinstance(loop.last("score"), ScoreOutput)
    alone = Loop(loop.tokenizer)
    alone.generate("2", make_request(prompt(2), new_tokens=9, sampling=sampled))
    alone.drain()
    assert loop.token_ids("2") == alone.token_ids("2")


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("stage", ["next", "wants", "take"])
def test_a_scoring_that_fails_anywhere_ends_alone(loop: Loop, stage: str, at_call: int) -> None:
    loop.generate("0", make_request(prompt(0), new_tokens=9))
    kind = failing(Scoring, stage, at_call)
    continuations = [[token, 5, 6, 7] for token in range(3, 12)]
    loop.add(kind("bad", score_request(prompt(1), continuations), Lease(), loop.serving))
    loop.score("score", score_request(prompt(1), continuations))
    loop.drain()
    assert isinstance(loop.error("bad").__cause__, BrokenError)
    assert loop.token_ids("0") == loop.decoder.greedy(prompt(0), 9)
    assert isinstance(loop.last("score"), ScoreOutput)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at_token", [0, 1, 4])
def test_a_request_with_no_token_left_to_choose_ends_alone_with_a_status_of_its_own(
    loop: Loop, at_token: int, temperature: float
) -> None:
    class Masked(Generation):
        def _sampling_row(self, *arguments: Any) -> Any:
            row = super()._sampling_row(*arguments)
            nothing = mask_of([False] * TINY_VOCAB_SIZE)
            return replace(row, allowed=nothing) if row.step == at_token else row

    loop.generate("0", make_request(prompt(0), new_tokens=9))
    request = make_request(prompt(1), new_tokens=9, sampling=SamplingParams(temperature=temperature, seed=1))
    loop.add(Masked("masked", request, Lease(), loop.serving))
    loop.drain()
    assert isinstance(loop.error("masked"), NoTokenAllowedError)
    assert len(loop.token_ids("masked")) == at_token
    assert loop.token_ids("0") == loop.decoder.greedy(prompt(0), 9)


@pytest.mark.parametrize("token_id", [-1, TINY_VOCAB_SIZE, 2**31])
def test_a_request_that_wants_the_log_probability_of_no_token_ends_alone(loop: Loop, token_id: int) -> None:
    class Outside(Generation):
        def wants(self, chunk: Any) -> Any:
            return replace(super().wants(chunk), target_rows=[0], target_ids=[token_id])

    loop.generate("0", make_request(prompt(0), new_tokens=9))
    loop.add(Outside("outside", make_request(prompt(1), new_tokens=9), Lease(), loop.serving))
    loop.drain()
    assert isinstance(loop.error("outside").__cause__, IndexError)
    assert loop.token_ids("0") == loop.decoder.greedy(prompt(0), 9)


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(loop: Loop) -> None:
    failures = iter([False, True, False, True])

    def broken(_: Any) -> None:
        if next(failures, False):
            raise BrokenError("the forward")

    loop.decoder.before_forward = broken
    loop.generate("0", make_request(prompt(0), new_tokens=9))
    loop.score("score", score_request(prompt(3), [[7, 8], [9, 8]]))
    loop.step()
    with capture_logs() as logs:
        loop.step()
    (log,) = logs
    assert isinstance(log["exc_info"], BrokenError)
    for name in ("0", "score"):
        error = loop.error(name)
        assert isinstance(error, RequestFailedError)
        assert error.error_id == log["error_id"]
    assert loop.steps.scheduler.allocator.num_used == 0
    loop.generate("1", make_request(prompt(1), new_tokens=9))
    loop.step()
    loop.generate("2", make_request(prompt(2), new_tokens=9))
    loop.step()
    loop.generate("3", make_request(prompt(0), new_tokens=9))
    loop.drain()
    assert isinstance(loop.error("1"), RequestFailedError)
    assert isinstance(loop.error("2"), RequestFailedError)
    assert loop.token_ids("3") == loop.decoder.greedy(prompt(0), 9)


class Stubborn(Generation):
    """Cannot be ended."""

    def drop(self, scheduler: Any) -> None:
        raise BrokenError("the end")


class StubbornScoring(Scoring):
    """Cannot be ended."""

    def drop(self, scheduler: Any) -> None:
        raise BrokenError("the end")


@pytest.mark.parametrize("end", ["cancel", "clock", "step"])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 4, 7])
def test_what_cannot_be_ended_is_dropped_with_all_it_holds(loop: Loop, num_steps: int, end: str) -> None:
    def broken(_: Any) -> None:
        raise BrokenError("the forward")

    generation = make_request(prompt(0, 20), new_tokens=90)
    scoring = score_request(prompt(3, 9), [[token] * 40 for token in range(3, 20)])
    jobs = (
        Stubborn("0", generation, Lease(), loop.serving),
        StubbornScoring("1", scoring, Lease(), loop.serving),
    )
    for job in jobs:
        loop.add(job)
    if end != "step":
        loop.generate("2", make_request(prompt(2), new_tokens=50))
    for _ in range(num_steps):
        loop.step()
    with capture_logs() as logs:
        if end == "step":
            loop.decoder.before_forward = broken
            for _ in range(3):  # both, whether or not they share a step
                loop.step()
            loop.decoder.before_forward = lambda batch: None
        for job in jobs:
            if end == "cancel":
                loop.cancel(job.id)
            job.deadline_s = 0.0
        loop.step()
    assert sorted(log["job"] for log in logs if "was dropped" in log["event"]) == ["0", "1"]
    assert all(isinstance(loop.error(job.id), EngineError) for job in jobs)
    loop.generate("3", make_request(prompt(3), new_tokens=9))
    loop.drain()
    if end != "step":
        assert loop.token_ids("2") == loop.decoder.greedy(prompt(2), 50)
    assert loop.token_ids("3") == loop.decoder.greedy(prompt(3), 9)


def test_a_step_with_what_a_job_left_behind_fails_once(loop: Loop) -> None:
    class Leaving(Generation):
        def drop(self, scheduler: Any) -> None:
            pass

    loop.add(Leaving("bad", make_request(prompt(0), new_tokens=90), Lease(), loop.serving))
    loop.step()
    loop.cancel("bad")
    loop.generate("1", make_request(prompt(1), new_tokens=9))
    loop.step()
    assert isinstance(loop.error("1"), RequestFailedError)
    loop.generate("2", make_request(prompt(2), new_tokens=9))
    loop.drain()
    assert loop.token_ids("2") == loop.decoder.greedy(prompt(2), 9)


class Spoiling(Generation):
    """Leaves its sequence in a state that no schedule can be made with."""

    spoils_at = 1
    num_ticks = -1

    def next(self, scheduler: Any, now_s: float) -> Any:
        self.num_ticks += 1
        if self.num_ticks == self.spoils_at:
            self._sequence.token_ids = cast(Any, None)
        return super().next(scheduler, now_s)


@pytest.mark.parametrize("at_tick", [1, 2, 3, 6])
@pytest.mark.parametrize("num_others", [0, 1, 12])
def test_a_schedule_that_fails_ends_all_requests_and_the_engine_goes_on(
    loop: Loop, at_tick: int, num_others: int
) -> None:
    good = [seed for seed in range(40) if POISON not in loop.decoder.greedy(prompt(seed), 20)][:12]
    for number in range(num_others):
        loop.generate(str(number), make_request(prompt(good[number]), new_tokens=20))
    loop.score("score", score_request(prompt(3), [[token] * 20 for token in range(3, 20)]))
    bad = Spoiling("bad", make_request(prompt(4), new_tokens=20, priority=1), Lease(), loop.serving)
    bad.spoils_at = at_tick
    loop.add(bad)
    with capture_logs() as logs:
        for _ in range(at_tick):
            loop.step()
    (log,) = logs
    assert isinstance(log["exc_info"], TypeError)
    for name in ("bad", "score", *map(str, range(num_others))):
        error = loop.error(name)
        assert isinstance(error, RequestFailedError)
        assert error.error_id == log["error_id"]
    assert not loop.steps.has_work
    assert loop.steps.is_idle
    assert loop.steps.scheduler.allocator.num_free == loop.num_blocks
    for seed in good:
        loop.generate(f"later {seed}", make_request(prompt(seed), new_tokens=9))
    loop.score("later", score_request(prompt(3), [[7, 8], [9, 8]]))
    loop.drain()
    for seed in good:
        assert loop.token_ids(f"later {seed}") == loop.decoder.greedy(prompt(seed), 9)
    assert isinstance(loop.last("later"), ScoreOutput)


def test_an_engine_whose_schedules_all_fail_gives_up(loop: Loop) -> None:
    def fail_some() -> None:
        for count in range(100):
            loop.add(Spoiling(str(count), make_request(prompt(0)), Lease(), loop.serving))
            loop.step()

    with pytest.raises(TypeError):
        fail_some()
    assert 2 < len(loop.events) < 20
    assert all(isinstance(loop.error(name), RequestFailedError) for name in loop.events)


def test_an_engine_whose_steps_all_fail_gives_up(loop: Loop) -> None:
    def broken(_: Any) -> None:
        raise BrokenError("the forward")

    def fail_some() -> Iterator[int]:
        for count in range(100):
            loop.generate(str(count), make_request(prompt(0)))
            loop.step()
            yield count

    loop.decoder.before_forward = broken
    with pytest.raises(BrokenError):
        for _ in fail_some():
            pass
    survived = len(loop.events)
    assert 2 < survived < 20
    assert all(isinstance(loop.error(name), RequestFailedError) for name in loop.events)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("rows") / "model", seed=13))


def answers_of(engine: Engine, count: int) -> list[asyncio.Task[Any]]:
    return [
        asyncio.create_task(collect(engine, make_request(random_ids(seed, 9, 300), new_tokens=12)))
        for seed in range(count)
    ]


async def test_a_failing_request_leaves_a_running_engine_and_its_adapter_free(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "Generation", failing(Generation, "take", 3))
    async with running_engine(model, {"a": random_lora(model.description, 1)}) as engine:
        with pytest.raises(RequestFailedError):
            await collect(engine, make_request(random_ids(1, 9, 300), make_record("a")))
        await until(lambda: not engine.in_use(make_record("a")))
        answers = await asyncio.gather(*answers_of(engine, 4))
        assert [len(answer.tokens) for answer in answers] == [12] * 4
        assert engine.is_alive
        assert engine.stats.kv_blocks_used == 0


async def test_a_failing_forward_tells_its_callers_and_the_engine_goes_on(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = default_model().forward, iter(range(1000))

    def sometimes_broken(*arguments: Any) -> Any:
        if next(calls) in (3, 4, 20):
            raise BrokenError("the forward")
        return forward(*arguments)

    async with running_engine(model) as engine:
        expected = [answer.token_ids for answer in await asyncio.gather(*answers_of(engine, 6))]
        monkeypatch.setattr(default_model(), "forward", sometimes_broken)
        results = await asyncio.gather(*answers_of(engine, 6), return_exceptions=True)
        assert any(isinstance(result, RequestFailedError) for result in results)
        calls = iter([3])
        with pytest.raises(RequestFailedError):
            await engine.score(ScoreRequest(id="s", prompt_token_ids=(5,), continuations=((7,),)))
        calls = iter([3])
        with pytest.raises(RequestFailedError):
            await asyncio.to_thread(engine.probe, random_lora(model.description, 2))
        calls = iter(range(100, 1000))
        again = await asyncio.gather(*answers_of(engine, 6))
        assert [answer.token_ids for answer in again] == expected
        assert engine.stats.kv_blocks_used == 0


async def test_an_engine_that_gives_up_tells_every_caller(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise BrokenError("the forward")

    async with running_engine(model) as engine:
        monkeypatch.setattr(default_model(), "forward", broken)
        kinds = set()
        for _ in range(20):
            with pytest.raises((RequestFailedError, EngineDeadError)) as caught:
                await collect(engine, make_request([5]))
            kinds.add(caught.type)
        assert kinds == {RequestFailedError, EngineDeadError}
        assert not engine.is_alive
