"""Steps that are launched before the one before them is collected: callers are told what they are told without that."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import EngineDeadError, EngineError, RequestFailedError
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.private_run import PrivateRun
from manyhats.engine.output import FinishReason, ScoreOutput, StepOutput
from manyhats.engine.request import (
    Request,
    ResponseOptions,
    SamplingParams,
    SpeculationParams,
    StoppingParams,
)
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import EOS_TOKEN_ID
from support.harnesses.engine import make_request
from support.harnesses.engine_loop import POISON, Loop, prompt, score_request

LOGPROBS = ResponseOptions(logprobs=True, top_logprobs=2, prompt_logprobs=True)
RANDOM = SamplingParams(temperature=1.0, top_p=0.9, seed=3)
HISTORY = {
    "repetition": make_request(prompt(1), sampling=replace(RANDOM, repetition_penalty=1.4)),
    "presence": make_request(prompt(1), sampling=replace(RANDOM, presence_penalty=1.0)),
    "frequency": make_request(prompt(1), sampling=replace(RANDOM, frequency_penalty=1.0)),
    "constraint": make_request(
        prompt(1), constraint=Constraint("regex", "[a-d]{9}"), stopping=StoppingParams(max_new_tokens=9)
    ),
    "drafts": make_request(prompt(1), speculation=SpeculationParams(num_tokens=3)),
}
"""Requests whose next token cannot be chosen without knowing the one before it."""


def ahead_of(tokenizer: Tokenizer, seed: int = 0, **fields: Any) -> Loop:
    return Loop(tokenizer, ahead=seed, **fields)


def kept_plans(loop: Loop) -> list[StepPlan]:
    """The plans of what is launched from now on."""
    plans: list[StepPlan] = []
    model = loop.steps._model
    forward = model.forward

    def launch(plan: StepPlan, *others: Any) -> Any:
        plans.append(plan)
        return forward(plan, *others)

    model.forward = launch  # type: ignore[method-assign]
    return plans


def names_choices(plan: StepPlan) -> bool:
    return bool((plan.token_ids < 0).any())


@dataclass(frozen=True)
class Arrival:
    """A request that comes before a turn, and is cancelled before another."""

    at: int
    request: Any
    slot: int = 0
    cancelled_at: int | None = None
    backlog: int | None = None


@dataclass
class Told:
    """What a caller was told, but for when and in how many pieces."""

    tokens: list[Any] = field(default_factory=list)
    prompt_tokens: list[Any] = field(default_factory=list)
    text: str = ""
    end: Any = None


def told(loop: Loop, arrivals: Sequence[Arrival], num_turns: int = 400) -> list[Told]:
    backlogs: dict[str, Backlog] = {}
    for turn in range(num_turns):
        for index, arrival in enumerate(arrivals):
            name = str(index)
            if arrival.at == turn:
                backlogs[name] = Backlog(arrival.backlog or 10**6, 10**9, 60.0)
                add(loop, name, arrival, backlogs[name])
            if arrival.cancelled_at == turn:
                loop.cancel(name)
        loop.step()
        if turn % 5 == 0:  # slow readers
            for backlog in backlogs.values():
                backlog.take(backlog._num_put - backlog._num_taken)
        if turn > max(arrival.at for arrival in arrivals) and not loop.steps.has_work:
            break
    loop.drain()
    return [told_of(loop, str(index)) for index in range(len(arrivals))]


def add(loop: Loop, name: str, arrival: Arrival, backlog: Backlog) -> None:
    request = replace(arrival.request, cache_salt=str(arrival.slot))
    if not isinstance(request, Request):
        loop.score(name, request, arrival.slot)
    elif arrival.backlog is None:
        loop.generate(name, request, arrival.slot)
    else:
        loop.add(Generation(name, request, Lease(), loop.serving, backlog))


def told_of(loop: Loop, name: str) -> Told:
    found = Told()
    for event in loop.events.get(name, ()):
        payload = event.payload
        if isinstance(payload, StepOutput):
            found.tokens += payload.tokens
            found.prompt_tokens += payload.prompt_tokens
            found.text += payload.text
            found.end = (payload.finish_reason, payload.stop)
        elif isinstance(payload, ScoreOutput):
            found.end = payload.scores
        else:
            found.end = type(payload)
    return found


def assert_told_alike(found: Sequence[Told], expected: Sequence[Told], arrivals: Sequence[Arrival]) -> None:
    for one, other, arrival in zip(found, expected, arrivals, strict=True):
        if arrival.cancelled_at is None:
            assert one == other
        else:  # somewhere on the way
            common = min(len(one.tokens), len(other.tokens))
            assert one.tokens[:common] == other.tokens[:common]


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 9),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {EOS_TOKEN_ID: 4.0, 17: 1.0}]),
)
stoppings = st.builds(
    StoppingParams,
    max_new_tokens=st.integers(1, 20),
    min_new_tokens=st.just(0),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), tuple(range(40, 80))]),
    stop_sequences=st.sampled_from([(), ("a", "e")]),
) | st.builds(
    StoppingParams,
    max_new_tokens=st.integers(6, 12),
    min_new_tokens=st.integers(1, 5),
    stop_token_ids=st.just((5, 9)),
)


@st.composite
def requests(draw: st.DrawFn) -> Any:
    shared = draw(st.integers(0, 2))
    tokens = [*prompt(shared, 8), *prompt(draw(st.integers(3, 6)), draw(st.integers(1, 20)))]
    if draw(st.integers(0, 5)) == 0:
        continuations = [prompt(each, draw(st.integers(1, 6))) for each in range(draw(st.integers(1, 5)))]
        return score_request(tokens, continuations, response=ResponseOptions(logprobs=True))
    if draw(st.integers(0, 9)) == 0:
        tokens[-1] = POISON
    return make_request(
        tokens,
        sampling=draw(samplings),
        stopping=draw(stoppings),
        response=draw(st.sampled_from([ResponseOptions(), LOGPROBS])),
        priority=draw(st.integers(0, 1)),
        speculation=SpeculationParams(num_tokens=draw(st.sampled_from([0, 0, 0, 4]))),
        constraint=draw(st.sampled_from([None, None, None, Constraint("regex", "[a-d]{2,6}( [a-d]{2,6})?")])),
    )


arrivals_of_requests = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 12),
        request=requests(),
        slot=st.integers(0, 2),
        cancelled_at=st.none() | st.none() | st.integers(1, 30),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=120, deadline=None)
@given(
    arrivals=arrivals_of_requests,
    num_blocks=st.integers(14, 40),
    sequences=st.integers(1, 6),
    spare=st.integers(0, 10),
    memory=st.sampled_from([None, 1]),
    seed=st.integers(0, 2**16),
)
def test_callers_are_told_what_they_are_told_where_nothing_runs_ahead(
    tokenizer: Tokenizer,
    arrivals: list[Arrival],
    num_blocks: int,
    sequences: int,
    spare: int,
    memory: int | None,
    seed: int,
) -> None:
    config = SchedulerConfig(
        max_num_sequences=sequences, max_num_batched_tokens=sequences + spare, max_waiting=50
    )

    def answers(ahead: int | None) -> list[Told]:
        loop = Loop(tokenizer, num_blocks=num_blocks, config=config, ahead=ahead)
        loop.decoder.memory = memory
        return told(loop, arrivals)

    assert_told_alike(answers(seed), answers(None), arrivals)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_blocks=st.integers(16, 40),
    seed=st.integers(0, 99),
)
def test_answers_to_slow_readers_pause_and_go_on(
    tokenizer: Tokenizer, sizes: list[int], num_blocks: int, seed: int
) -> None:
    arrivals = [
        Arrival(
            index,
            make_request(prompt(index), new_tokens=25, sampling=RANDOM, response=LOGPROBS),
            backlog=size,
        )
        for index, size in enumerate(sizes)
    ]
    found, expected = (
        told(Loop(tokenizer, num_blocks=num_blocks, ahead=ahead), arrivals) for ahead in (seed, None)
    )
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(
    failing=st.sets(st.integers(0, 30), max_size=4),
    error=st.sampled_from([MemoryError(), RuntimeError("broken")]),
    seed=st.integers(0, 99),
)
def test_steps_that_fail_end_their_own_jobs_and_the_others_say_the_same(
    tokenizer: Tokenizer, failing: set[int], error: Exception, seed: int
) -> None:
    loop = ahead_of(tokenizer, seed, num_blocks=24)
    calls = iter(range(10_000))

    def fail(_: Any) -> None:
        if next(calls) in failing:
            raise error

    loop.decoder.before_forward = fail
    arrivals = [
        Arrival(
            2 * index,
            make_request([*prompt(9, 8), *prompt(index, 5)], new_tokens=12, sampling=RANDOM),
            index % 3,
        )
        for index in range(8)
    ]
    arrivals.append(Arrival(5, score_request(prompt(9, 10), [prompt(each, 4) for each in range(6)])))
    with capture_logs():
        found = told(loop, arrivals)
    expected = told(Loop(tokenizer, ahead=None), arrivals)
    for one, other in zip(found, expected, strict=True):
        assert one == other or (isinstance(one.end, type) and issubclass(one.end, EngineError))
        assert one.tokens == other.tokens[: len(one.tokens)]


def test_a_step_is_launched_before_the_one_before_it_is_collected(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    plans = kept_plans(loop)
    loop.generate("a", make_request(prompt(1, 7), new_tokens=6))
    loop.generate("b", make_request(prompt(2, 7), new_tokens=6))
    loop.step()
    assert loop.steps.is_in_flight
    assert loop.events == {}, "nothing is known yet"
    loop.step()
    assert plans[1].token_ids.tolist() == [-1, -2], "each names its own choice"
    assert [len(loop.token_ids(name)) for name in "ab"] == [1, 1]
    loop.drain()
    assert loop.device.most_in_flight == 2
    for name, seed in (("a", 1), ("b", 2)):
        assert loop.token_ids(name) == loop.decoder.greedy(prompt(seed, 7), 6)


def test_an_answer_of_a_known_length_takes_no_row_too_many(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    plans = kept_plans(loop)
    loop.generate("a", make_request(prompt(1), new_tokens=6))
    loop.drain()
    assert sum(plan.num_rows for plan in plans) == len(prompt(1)) + 5
    assert loop.finish_reason("a") is FinishReason.LENGTH


def test_one_that_turns_out_to_have_ended_has_one_row_in_vain(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    expected = loop.decoder.greedy(prompt(1), 12)
    plans = kept_plans(loop)
    stopping = StoppingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(expected[4],))
    loop.generate("a", make_request(prompt(1), stopping=stopping))
    loop.drain()
    assert loop.token_ids("a") == expected[: expected.index(expected[4]) + 1]
    assert sum(plan.num_rows for plan in plans) == len(prompt(1)) + len(loop.token_ids("a"))


def test_blocks_and_slots_of_one_that_ended_stay_until_its_last_step_is_collected(
    tokenizer: Tokenizer,
) -> None:
    loop = ahead_of(tokenizer)
    loop.generate("a", make_request(prompt(1), new_tokens=40))
    for _ in range(4):
        loop.step()
    used = loop.steps.scheduler.allocator.num_used
    loop.cancel("a")
    assert loop.steps.scheduler.allocator.num_used == used
    assert loop.steps.has_work
    assert not loop.steps.is_idle
    loop.step()
    assert loop.steps.scheduler.allocator.num_used == 0
    assert not loop.steps.has_work


def test_a_turn_with_nothing_to_launch_collects_what_is_in_flight(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    loop.generate("a", make_request(prompt(1), new_tokens=2))
    loop.step()
    assert not loop.steps.is_idle
    loop.step()
    assert not loop.token_ids("a")[1:], "the second is launched, and the first is here"
    loop.step()
    assert loop.finish_reason("a") is FinishReason.LENGTH
    assert not loop.steps.has_work
    assert loop.steps.is_idle


@pytest.mark.parametrize("name", HISTORY)
def test_what_depends_on_its_tokens_waits_for_them(name: str, tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    plans = kept_plans(loop)
    loop.generate("a", HISTORY[name])
    loop.drain()
    assert len(plans) > 2
    assert not any(map(names_choices, plans))
    assert loop.device.most_in_flight == 1
    other = Loop(tokenizer, ahead=None)
    other.generate("a", HISTORY[name])
    other.drain()
    assert told_of(loop, "a") == told_of(other, "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": RANDOM},
        {"sampling": replace(RANDOM, logit_bias={5: 2.0, 9: -3.0})},
        {"stopping": StoppingParams(max_new_tokens=8, min_new_tokens=6)},
        {"stopping": StoppingParams(max_new_tokens=8, stop_sequences=("never there",), ignore_eos=True)},
        {"response": LOGPROBS},
    ],
    ids=["sampled", "bias", "min_new_tokens", "stop sequence", "log-probabilities"],
)
def test_what_depends_on_numbers_of_tokens_alone_does_not_wait(fields: Any, tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    plans = kept_plans(loop)
    loop.generate("a", make_request(prompt(1), **fields))
    loop.drain()
    assert all(map(names_choices, plans[1:]))


def test_no_sequence_is_preempted_while_it_is_in_flight(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer, num_blocks=12)
    loop.decoder.poison = ()
    for seed in range(5):
        loop.generate(str(seed), make_request(prompt(seed), new_tokens=24))
    num_preempted = 0
    while loop.steps.has_work:
        was_in_flight = loop.steps.is_in_flight
        loop.step()
        num_preempted = sum(stats.num_preempted for stats in loop.stats)
        assert was_in_flight or loop.steps.is_in_flight
    assert num_preempted > 0
    assert not loop.device.mistakes
    for seed in range(5):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed), 24)


def test_a_step_that_was_launched_on_one_that_failed_is_not_believed(tokenizer: Tokenizer) -> None:
    """The later of the two had a prompt of its own, which is computed again."""
    for seed in range(20):
        loop = ahead_of(tokenizer, seed)
        calls = iter(range(1000))

        def fail(_: Any, calls: Any = calls) -> None:
            if next(calls) == 3:
                raise RuntimeError("broken")

        loop.decoder.before_forward = fail
        loop.generate("a", make_request(prompt(1), new_tokens=20))
        for _ in range(3):
            loop.step()
        loop.generate("b", make_request(prompt(2), new_tokens=8))
        with capture_logs():
            loop.drain()
        assert isinstance(loop.error("a"), RequestFailedError)
        ended = loop.events["b"][-1].payload
        assert isinstance(ended, RequestFailedError) or loop.token_ids("b") == loop.decoder.greedy(
            prompt(2), 8
        )


def test_a_device_that_is_dead_ends_the_engine(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)

    def die(_: Any) -> None:
        raise EngineDeadError("the device is gone")

    loop.generate("a", make_request(prompt(1), new_tokens=20))
    loop.step()
    loop.step()
    loop.decoder.before_forward = die
    with pytest.raises(EngineDeadError, match="gone"):
        loop.drain()


def test_everything_can_be_dropped_while_a_step_is_in_flight(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    loop.generate("a", make_request(prompt(1)))
    loop.generate("b", make_request(prompt(2)), 1)
    loop.step()
    assert loop.steps.is_in_flight
    events = loop.steps.drop_all(EngineDeadError("gone"))
    assert sorted(event.job_id for event in events) == ["a", "b"]
    assert not loop.steps.has_work
    assert loop.steps.scheduler.allocator.num_used == 0
    assert not loop.device.mistakes
    loop.generate("c", make_request(prompt(3), new_tokens=4))
    loop.drain()
    assert loop.token_ids("c") == loop.decoder.greedy(prompt(3), 4)


def test_a_private_run_ends_beside_streams(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    loop.generate("a", make_request(prompt(1), new_tokens=20))
    for _ in range(3):
        loop.step()
    loop.add(PrivateRun("private", tuple(prompt(2, 12))))
    loop.drain()
    (event,) = loop.events["private"]
    expected = [loop.decoder.logits(np.array(prompt(2, 12)[: end + 1])).numpy() for end in range(12)]
    assert np.array_equal(event.payload, np.stack(expected))
    assert loop.token_ids("a") == loop.decoder.greedy(prompt(1), 20)


def test_the_time_of_steps_that_overlap_counts_once(tokenizer: Tokenizer) -> None:
    loop = ahead_of(tokenizer)
    loop.decoder.before_forward = lambda plan: time.sleep(0.005)
    loop.generate("a", make_request(prompt(1), new_tokens=12))
    began = time.monotonic()
    loop.drain()
    whole_s = time.monotonic() - began
    seconds = sum(stats.duration_s for stats in loop.stats)
    assert 12 * 0.005 <= seconds <= whole_s
    assert sum(stats.num_decode_tokens for stats in loop.stats) == 11
