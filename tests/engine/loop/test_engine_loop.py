from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    NumericalError,
    QueueFullError,
    RequestCancelledError,
)
from manyhats.engine.output import FinishReason, ScoreOutput, StepOutput
from manyhats.engine.request import SamplingParams, StoppingParams
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import EOS_TOKEN_ID, TINY_VOCAB_SIZE
from support.harnesses.engine import make_request
from support.harnesses.engine_loop import POISON, Loop, prompt, score_request


def test_generations_that_join_and_leave_at_any_step_say_what_each_says_alone(loop: Loop) -> None:
    wanted = {str(seed): (prompt(seed, 3 * seed + 1), 5 + 4 * (seed % 3), seed % 3) for seed in range(12)}
    for name, (token_ids, count, slot) in wanted.items():
        loop.generate(name, make_request(token_ids, new_tokens=count), slot)
        loop.step()
    loop.drain()
    for name, (token_ids, count, slot) in wanted.items():
        assert loop.token_ids(name) == loop.decoder.greedy(token_ids, count, slot)
        assert loop.finish_reason(name) is FinishReason.LENGTH


def test_a_pool_that_forces_preemption_changes_no_token(tokenizer: Tokenizer) -> None:
    loop = Loop(tokenizer, num_blocks=12)
    for seed in range(6):
        loop.generate(str(seed), make_request(prompt(seed, 10), new_tokens=25))
    loop.drain()
    assert sum(stats.num_preempted for stats in loop.stats) > 0
    for seed in range(6):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed, 10), 25)


def test_higher_priority_starts_first(tokenizer: Tokenizer) -> None:
    config = SchedulerConfig(max_num_sequences=1, max_num_batched_tokens=16, max_waiting=20)
    loop = Loop(tokenizer, config=config)
    for name, priority in (("low", -1), ("middle", 0), ("high", 1)):
        loop.generate(name, make_request(prompt(1), new_tokens=2, priority=priority))
    loop.drain()
    assert list(loop.events) == ["high", "middle", "low"]


def test_cancelling_frees_the_blocks_as_soon_as_no_step_uses_them_and_nobody_else_notices(loop: Loop) -> None:
    for seed in range(4):
        loop.generate(str(seed), make_request(prompt(seed, 30), new_tokens=10))
    for _ in range(6):
        loop.step()
    used = loop.steps.scheduler.allocator.num_used
    loop.cancel("1")
    loop.land()
    assert loop.steps.scheduler.allocator.num_used < used
    assert isinstance(loop.error("1"), RequestCancelledError)
    loop.cancel("1")
    loop.cancel("never heard of")
    loop.drain()
    for seed in (0, 2, 3):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed, 30), 10)
    assert len(loop.token_ids("1")) < 10


def test_cancelling_what_still_waits_or_is_being_prefilled(loop: Loop) -> None:
    loop.generate("prefill", make_request(prompt(1, 60), new_tokens=3))
    loop.generate("waiting", make_request(prompt(2, 60), new_tokens=3))
    loop.step()
    loop.cancel("waiting")
    loop.cancel("prefill")
    loop.land()
    assert not loop.steps.has_work
    assert loop.steps.scheduler.allocator.num_used == 0


def test_a_deadline_ends_a_request_wherever_it_is(loop: Loop) -> None:
    soon = time.monotonic() + 0.03
    loop.generate("running", make_request(prompt(1), new_tokens=200, deadline_s=soon))
    loop.generate("late already", make_request(prompt(2), deadline_s=time.monotonic() - 1))
    loop.generate("other", make_request(prompt(3), new_tokens=6))
    loop.step()
    assert isinstance(loop.error("late already"), DeadlineExceededError)
    time.sleep(0.04)
    loop.step()
    assert isinstance(loop.error("running"), DeadlineExceededError)
    loop.drain()
    assert loop.token_ids("other") == loop.decoder.greedy(prompt(3), 6)


def test_a_scoring_that_is_given_up_in_the_middle_of_a_step_leaves_others_in_it_alone(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    continuations = [[token] * (2 if token % 2 else 12) for token in range(3, 40)]
    soon = time.monotonic() + 1000
    loop.score("score", score_request(prompt(1, 20), continuations, deadline_s=soon))
    loop.generate("other", make_request(prompt(2), new_tokens=12))
    while loop.steps.scheduler.num_running < 2 or len(loop.token_ids("other")) < 3:
        loop.step()
    # From now on no continuation that waits could meet the deadline, while others of them run.
    monkeypatch.setattr(
        loop.steps.scheduler._pace, "can_meet", lambda deadline_s, num_tokens: deadline_s is None
    )
    loop.drain()
    assert isinstance(loop.error("score"), DeadlineExceededError)
    assert loop.token_ids("other") == loop.decoder.greedy(prompt(2), 12)


def test_a_time_limit_gives_what_is_there_by_then(loop: Loop) -> None:
    stopping = StoppingParams(max_new_tokens=200, ignore_eos=True, time_limit_s=0.5)
    loop.generate("limited", make_request(prompt(1), stopping=stopping, accepted_s=time.monotonic()))
    loop.generate("queued", make_request(prompt(2), stopping=stopping, accepted_s=time.monotonic() - 1))
    loop.step()
    assert loop.finish_reason("queued") is FinishReason.TIME_LIMIT
    assert loop.token_ids("queued") == []
    loop.step()
    time.sleep(0.5)
    loop.drain()
    assert loop.finish_reason("limited") is FinishReason.TIME_LIMIT
    token_ids = loop.token_ids("limited")
    assert token_ids
    assert token_ids == loop.decoder.greedy(prompt(1), len(token_ids))
    output = loop.last("limited")
    assert output.usage.generated_tokens == len(token_ids)


def test_logits_that_are_not_finite_fail_their_request_alone(loop: Loop) -> None:
    loop.generate("0", make_request(prompt(0), new_tokens=8))
    loop.generate("bad", make_request([*prompt(1), POISON], new_tokens=8))
    loop.generate("2", make_request(prompt(2), new_tokens=8))
    loop.score("bad score", score_request([*prompt(3), POISON, 5], [[7, 8], [9]]))
    loop.score("score", score_request(prompt(4), [[7, 8], [9]]))
    loop.drain()
    for name in ("bad", "bad score"):
        assert isinstance(loop.error(name), NumericalError)
    assert isinstance(loop.last("score"), ScoreOutput)
    for seed in (0, 2):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed), 8)


def test_a_request_that_fails_leaves_nothing_in_the_prefix_cache(loop: Loop) -> None:
    """Its blocks might hold NaN."""
    loop.generate("bad", make_request([*prompt(1, 12), POISON], new_tokens=4))
    loop.drain()
    assert loop.steps.scheduler.allocator.num_cached == 0


def test_a_full_queue_refuses_and_goes_on(tokenizer: Tokenizer) -> None:
    config = SchedulerConfig(max_num_sequences=2, max_num_batched_tokens=16, max_waiting=3)
    loop = Loop(tokenizer, config=config)
    for seed in range(5):
        loop.generate(str(seed), make_request(prompt(seed), new_tokens=3))
    loop.score("score", score_request(prompt(9), [[1], [2]]))
    for name in ("3", "4", "score"):
        error = loop.error(name)
        assert isinstance(error, QueueFullError)
        assert error.limit == 3
    loop.drain()
    for seed in range(3):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed), 3)
    assert loop.generate("5", make_request(prompt(5), new_tokens=3)) not in loop.events
    loop.drain()


def test_scoring_with_more_continuations_than_the_queue_holds_gets_through(tokenizer: Tokenizer) -> None:
    config = SchedulerConfig(max_num_sequences=2, max_num_batched_tokens=16, max_waiting=3)
    loop = Loop(tokenizer, config=config)
    loop.score("score", score_request(prompt(1, 20), [[token, token + 1] for token in range(3, 93)]))
    for seed in range(3):
        loop.step()
        loop.generate(str(seed), make_request(prompt(seed), new_tokens=3))
    loop.drain()
    output = loop.last("score")
    assert isinstance(output, ScoreOutput)
    assert [[t.id for t in score.tokens] for score in output.scores] == [[t, t + 1] for t in range(3, 93)]


@pytest.mark.parametrize("num_tokens", [2, 3, 9, 30])
@pytest.mark.parametrize("max_waiting", [1, 2, 7])
def test_a_scoring_that_has_begun_ends_however_many_come_after_it(
    num_tokens: int, max_waiting: int, tokenizer: Tokenizer
) -> None:
    """The queue is full whenever a continuation could join it."""
    config = SchedulerConfig(max_num_sequences=2, max_num_batched_tokens=16, max_waiting=max_waiting)
    loop = Loop(tokenizer, config=config)
    loop.score("score", score_request(prompt(1, 20), [[token] * num_tokens for token in range(3, 23)]))
    for step in range(2000):
        for number in range(max_waiting):
            loop.generate(f"{step} {number}", make_request(prompt(number), new_tokens=3, accepted_s=1e12))
        loop.step()
        if "score" in loop.events:
            break
    assert isinstance(loop.last("score"), ScoreOutput)
    refused = [name for name in loop.events if isinstance(loop.events[name][-1].payload, QueueFullError)]
    served = [name for name in loop.events if isinstance(loop.events[name][-1].payload, StepOutput)]
    assert refused
    assert served, "they have their turn beside it"


def test_a_scoring_s_continuations_keep_nobody_out_of_the_queue(tokenizer: Tokenizer) -> None:
    config = SchedulerConfig(max_num_sequences=2, max_num_batched_tokens=16, max_waiting=3)
    loop = Loop(tokenizer, config=config)
    loop.score("score", score_request(prompt(1, 20), [[token, token + 1] for token in range(3, 93)]))
    while loop.steps.scheduler.num_waiting < 10:
        loop.step()
    for seed in range(4):
        loop.generate(str(seed), make_request(prompt(seed), new_tokens=3))
    assert isinstance(loop.error("3"), QueueFullError)
    loop.drain()
    for seed in range(3):
        assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed), 3)
    assert isinstance(loop.last("score"), ScoreOutput)


@settings(max_examples=40, deadline=None)
@given(
    scorings=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=12)),
        min_size=1,
        max_size=6,
    ),
    num_blocks=st.integers(18, 80),
    max_sequences=st.integers(1, 8),
    spare=st.integers(0, 40),
    bulk=st.integers(1, 9),
)
def test_scorings_alone_get_on_in_every_step(
    tokenizer: Tokenizer,
    scorings: list[tuple[int, list[int]]],
    num_blocks: int,
    max_sequences: int,
    spare: int,
    bulk: int,
) -> None:
    config = SchedulerConfig(
        max_num_sequences=max_sequences,
        max_num_batched_tokens=max_sequences + spare,
        max_waiting=12,
        max_bulk_tokens=bulk,
    )
    loop = Loop(tokenizer, num_blocks=num_blocks, config=config)
    num_tokens = 0
    for number, (length, lengths) in enumerate(scorings):
        continuations = [prompt(index, count) for index, count in enumerate(lengths)]
        num_tokens += length + sum(length + count for count in lengths)
        loop.score(str(number), score_request(prompt(number, length), continuations))
    num_steps = 0
    while loop.steps.has_work:
        result = loop.steps.run()
        assert result.stats is not None or loop.steps.is_in_flight
        num_steps += 1
        assert num_steps <= num_tokens, "at least one token a step, and none twice but in a prompt taken back"
    assert loop.steps.scheduler.allocator.num_used == 0


def test_a_scoring_is_cancelled_with_all_its_sequences(loop: Loop) -> None:
    loop.score("score", score_request(prompt(1, 20), [[token] * 9 for token in range(3, 40)]))
    loop.generate("other", make_request(prompt(2), new_tokens=12))
    for _ in range(5):
        loop.step()
    loop.cancel("score")
    assert isinstance(loop.error("score"), RequestCancelledError)
    loop.drain()
    assert loop.token_ids("other") == loop.decoder.greedy(prompt(2), 12)


def test_eos_and_stop_tokens_end_a_generation_and_are_among_its_tokens(loop: Loop) -> None:
    expected = loop.decoder.greedy(prompt(1), 12)
    third = expected[3]
    first = expected.index(third)
    stopping = StoppingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(third,))
    loop.generate("stop", make_request(prompt(1), stopping=stopping))
    bias = SamplingParams(logit_bias={EOS_TOKEN_ID: 100.0})
    loop.generate("eos", make_request(prompt(1), sampling=bias, stopping=StoppingParams(max_new_tokens=12)))
    later = StoppingParams(max_new_tokens=12, min_new_tokens=4)
    loop.generate("later", make_request(prompt(1), sampling=bias, stopping=later))
    ignored = StoppingParams(max_new_tokens=5, ignore_eos=True)
    loop.generate("ignored", make_request(prompt(1), sampling=bias, stopping=ignored))
    loop.drain()
    assert loop.token_ids("stop") == expected[: first + 1]
    assert loop.finish_reason("stop") is FinishReason.STOP_SEQUENCE
    assert (loop.token_ids("eos"), loop.text("eos")) == ([EOS_TOKEN_ID], "")
    assert loop.finish_reason("eos") is FinishReason.EOS
    assert loop.token_ids("later") == [*expected[:4], EOS_TOKEN_ID]
    assert loop.token_ids("ignored") == [EOS_TOKEN_ID] * 5
    assert loop.finish_reason("ignored") is FinishReason.LENGTH


def force(tokenizer: Tokenizer, loop: Loop, text: str) -> list[int]:
    """Make the decoder say a text, whatever it is asked; returns its token ids."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    count = len(prompt(1))

    def logits(history: Any) -> Any:
        import torch

        row = torch.zeros(TINY_VOCAB_SIZE)
        row[token_ids[min(len(history) - count, len(token_ids) - 1)]] = 1.0
        return row

    loop.decoder.logits = logits  # type: ignore[method-assign]
    return token_ids


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_sequence_ends_a_generation_wherever_tokens_split_it(
    include: bool, tokenizer: Tokenizer, loop: Loop
) -> None:
    token_ids = force(tokenizer, loop, "one in the end, then §more and more")
    stopping = StoppingParams(
        max_new_tokens=60, stop_sequences=("nowhere", "n §m"), include_stop_sequence=include
    )
    loop.generate("stopped", make_request(prompt(1), stopping=stopping))
    loop.generate("whole", make_request(prompt(1), new_tokens=len(token_ids)))
    loop.drain()
    assert loop.text("stopped") == "one in the end, the" + ("n §m" if include else "")
    assert loop.finish_reason("stopped") is FinishReason.STOP_SEQUENCE
    assert loop.text("whole") == "one in the end, then §more and more"
    said = loop.token_ids("stopped")
    assert said == token_ids[: len(said)]
    assert len(said) < len(token_ids)
    for event in loop.events["stopped"]:
        assert isinstance(event.payload, StepOutput)
        assert "\N{REPLACEMENT CHARACTER}" not in event.payload.text


def test_sampling_by_seed_is_the_same_alone_in_a_batch_and_preempted(tokenizer: Tokenizer) -> None:
    def said(num_blocks: int, seeds: Iterable[int]) -> dict[int, list[int]]:
        loop = Loop(tokenizer, num_blocks=num_blocks)
        for seed in seeds:
            sampling = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=seed)
            loop.generate(str(seed), make_request(prompt(1), new_tokens=20, sampling=sampling))
        loop.drain()
        return {seed: loop.token_ids(str(seed)) for seed in seeds}

    together = said(64, range(7))
    assert len({tuple(tokens) for tokens in together.values()}) == 7
    assert said(12, range(7)) == together
    assert said(64, [3])[3] == together[3]


def test_a_prompt_seen_before_comes_from_the_cache_and_says_the_same(loop: Loop) -> None:
    request = make_request(prompt(1, 30), new_tokens=4)
    loop.generate("first", request)
    loop.drain()
    loop.generate("again", request)
    loop.generate("salted", make_request(prompt(1, 30), new_tokens=4, cache_salt="mine"))
    loop.drain()
    assert loop.token_ids("again") == loop.token_ids("first") == loop.token_ids("salted")
    assert loop.last("again").usage.cached_prompt_tokens == 28
    assert loop.last("salted").usage.cached_prompt_tokens == 0
    assert sum(stats.prefix_cache_hits for stats in loop.stats) >= 28


def test_usage_and_statistics_add_up(loop: Loop) -> None:
    accepted = time.monotonic() - 0.5
    loop.generate("a", make_request(prompt(1, 20), new_tokens=5, accepted_s=accepted), 1)
    loop.generate("b", make_request(prompt(2, 7), new_tokens=3, accepted_s=accepted), 2)
    loop.drain()
    usage = loop.last("a").usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (20, 5)
    assert usage.queue_s >= 0.5
    assert usage.prefill_s >= 0
    assert usage.decode_s >= 0
    assert sum(stats.num_prefill_tokens for stats in loop.stats) == 27
    assert sum(stats.num_decode_tokens for stats in loop.stats) == 4 + 2
    assert max(stats.num_adapters for stats in loop.stats) == 2
    assert all(stats.duration_s >= 0 for stats in loop.stats)


def test_everything_can_be_dropped_with_one_error(loop: Loop) -> None:
    loop.generate("a", make_request(prompt(1)))
    loop.score("b", score_request(prompt(2), [[1, 2], [3]]))
    loop.step()
    events = loop.steps.drop_all(EngineDeadError("gone"))
    assert sorted(event.job_id for event in events) == ["a", "b"]
    assert all(isinstance(event.payload, EngineDeadError) and event.is_last for event in events)
    assert not loop.steps.has_work
    assert loop.steps.scheduler.allocator.num_used == 0


def test_a_step_with_nothing_to_do_runs_nothing(loop: Loop) -> None:
    result = loop.steps.run()
    assert (result.events, result.stats) == ((), None)
    assert loop.decoder.num_forwards == 0
