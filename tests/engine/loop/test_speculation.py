"""Requests that guess ahead, in an engine whose logits are a hash of what was read: they say what they say without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import EngineError, FieldInvalidError, NoTokenAllowedError, NumericalError
from manyhats.engine.output import FinishReason, StepOutput
from manyhats.engine.request import (
    MAX_DRAFT_TOKENS,
    Request,
    ResponseOptions,
    SamplingParams,
    SpeculationParams,
    StoppingParams,
)
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.engine import make_request
from support.harnesses.engine_loop import Loop, prompt

OPEN = Constraint("regex", "[a-e ]*")
CONSTRAINTS = (
    OPEN,
    Constraint("regex", "[a-d]{2,6}( [a-d]{2,6}){3}"),
    Constraint("choice", ("abcabcabcabd", "abcabcabcabcd", "b")),
    Constraint("json_schema", '{"type": "array", "items": {"enum": ["ab", "abab", 1]}, "maxItems": 9}'),
)
WIDE = SchedulerConfig(max_num_sequences=8, max_num_batched_tokens=16, max_waiting=20, max_draft_rows=20)
ALL = SpeculationParams(num_tokens=MAX_DRAFT_TOKENS)


def new_loop(tokenizer: Tokenizer, **fields: Any) -> Loop:
    """Its answers soon repeat what was said."""
    loop = Loop(tokenizer, **{"config": WIDE, **fields})
    loop.decoder.memory, loop.decoder.poison = 1, ()
    return loop


def answers(loop: Loop, requests: Sequence[Request]) -> list[tuple[object, ...]]:
    """Everything each caller is told but when, and in how many pieces."""
    for index, request in enumerate(requests):
        slot = index % 3
        loop.generate(str(index), replace(request, cache_salt=str(slot)), slot)
        loop.step()
    loop.drain()
    return [answer(loop, str(index)) for index in range(len(requests))]


def answer(loop: Loop, name: str) -> tuple[object, ...]:
    payloads = [event.payload for event in loop.events[name]]
    outputs = [each for each in payloads if isinstance(each, StepOutput)]
    last = payloads[-1]
    ended = repr(last) if isinstance(last, EngineError) else (last.finish_reason, last.stop)
    usages = [output.usage for output in outputs]
    return (
        [token for output in outputs for token in output.tokens],
        [token for output in outputs for token in output.prompt_tokens],
        "".join(output.text for output in outputs),
        ended,
        [(usage.prompt_tokens, usage.generated_tokens) for usage in usages[-1:]],
    )


def num_drafts(loop: Loop) -> tuple[int, int]:
    """Drafted tokens of all answers, and those that came."""
    ends = [
        [event.payload.usage for event in events if isinstance(event.payload, StepOutput)][-1]
        for events in loop.events.values()
    ]
    return sum(usage.draft_tokens for usage in ends), sum(usage.accepted_draft_tokens for usage in ends)


@st.composite
def requests_(draw: st.DrawFn) -> Request:
    small = st.integers(0, 40)
    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        seed=draw(small),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.4])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.2, -0.2])),
        logit_bias=dict.fromkeys(draw(st.lists(st.integers(60, 90), max_size=3)), 9.0),
    )
    num_logprobs = draw(st.sampled_from([None, 0, 2]))
    most = draw(st.integers(1, 30))
    stopping = StoppingParams(
        max_new_tokens=most,
        min_new_tokens=draw(st.integers(0, most)),
        stop_token_ids=draw(st.lists(st.integers(0, TINY_VOCAB_SIZE - 1), max_size=3)),
        ignore_eos=draw(st.booleans()),
        include_stop_sequence=draw(st.booleans()),
    )
    return make_request(
        prompt(draw(small), draw(st.integers(1, 30))),
        sampling=sampling,
        stopping=stopping,
        response=ResponseOptions(
            logprobs=num_logprobs is not None,
            top_logprobs=num_logprobs or 0,
            prompt_logprobs=draw(st.booleans()),
            skip_special_tokens=draw(st.booleans()),
        ),
        constraint=draw(st.sampled_from([None, None, *CONSTRAINTS])),
        speculation=SpeculationParams(num_tokens=draw(st.sampled_from([0, 1, 4, MAX_DRAFT_TOKENS]))),
        priority=draw(st.integers(0, 1)),
    )


@st.composite
def loops(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    config = SchedulerConfig(
        max_num_sequences=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.sampled_from([6, 16])),
        max_waiting=20,
        max_draft_rows=draw(st.sampled_from([2, 8, 30])),
    )
    return {"num_blocks": -(-90 // block_size), "block_size": block_size, "config": config}


def stopped_by_its_text(request: Request, text: str, data: st.DataObject) -> Request:
    """The same request with a stop sequence that its answer has, if it has any text."""
    if not text or not data.draw(st.booleans()):
        return request
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 4))]
    return replace(request, stopping=replace(request.stopping, stop_sequences=(stop,)))


def without(request: Request) -> Request:
    return replace(request, speculation=SpeculationParams())


@settings(max_examples=40, deadline=None)
@given(asked=st.lists(requests_(), min_size=1, max_size=3), fields=loops(), data=st.data())
def test_answers_are_to_the_bit_those_without(
    tokenizer: Tokenizer, asked: list[Request], fields: dict[str, Any], data: st.DataObject
) -> None:
    plain = new_loop(tokenizer, num_blocks=200)
    texts = [str(each[2]) for each in answers(plain, [without(request) for request in asked])]
    asked = [stopped_by_its_text(*each, data) for each in zip(asked, texts, strict=True)]
    expected = answers(new_loop(tokenizer, num_blocks=200), [without(request) for request in asked])
    assert answers(new_loop(tokenizer, **fields), asked) == expected


def repeating(seed: int, new_tokens: int = 60, **fields: Any) -> Request:
    return make_request(
        prompt(seed),
        new_tokens=new_tokens,
        response=ResponseOptions(logprobs=True),
        speculation=ALL,
        **fields,
    )


def test_drafts_that_come_save_steps(tokenizer: Tokenizer) -> None:
    loop, plain = new_loop(tokenizer), new_loop(tokenizer)
    assert answers(loop, [repeating(1)]) == answers(plain, [without(repeating(1))])
    drafted, accepted = num_drafts(loop)
    assert drafted == sum(stats.num_draft_tokens for stats in loop.stats)
    assert loop.decoder.num_forwards == plain.decoder.num_forwards - accepted
    assert loop.decoder.num_forwards < 0.6 * plain.decoder.num_forwards
    assert num_drafts(plain) == (0, 0)
    assert max(stats.num_decode_tokens for stats in loop.stats) == 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.7, seed=3)])
def test_rows_after_a_wrong_draft_do_not_count_even_if_they_are_not_finite(
    tokenizer: Tokenizer, sampling: SamplingParams
) -> None:
    requests = [repeating(seed, sampling=sampling) for seed in range(4)]
    plain = new_loop(tokenizer)
    expected = answers(plain, [without(request) for request in requests])
    said = [prompt(seed) + plain.token_ids(str(seed)) for seed in range(4)]
    loop = new_loop(tokenizer)
    finite = loop.decoder.logits
    bad = []

    def logits(history: np.ndarray) -> torch.Tensor:
        ids = (history % TINY_VOCAB_SIZE).tolist()
        if any(ids == each[: len(ids)] for each in said):
            return finite(history)
        bad.append(ids)
        return torch.full((TINY_VOCAB_SIZE,), torch.nan)

    loop.decoder.logits = logits  # type: ignore[method-assign]
    assert answers(loop, requests) == expected
    assert bad, "no draft was wrong"


@pytest.mark.parametrize("position", range(20, 45, 3))
def test_a_row_that_is_not_finite_ends_an_answer_where_it_would_without(
    tokenizer: Tokenizer, position: int
) -> None:
    found = []
    for request in (repeating(1), without(repeating(1))):
        loop = new_loop(tokenizer)
        finite = loop.decoder.logits
        loop.decoder.logits = lambda history, finite=finite: (  # type: ignore[method-assign,misc]
            torch.full((TINY_VOCAB_SIZE,), torch.nan) if history.size == position else finite(history)
        )
        found.append(answers(loop, [request]))
        assert isinstance(loop.error("0"), NumericalError)
    assert found[0] == found[1]


def test_an_answer_for_which_no_token_is_left_has_sent_all_before(tokenizer: Tokenizer) -> None:
    """Where the language lets only one token follow, and that is forbidden."""
    request = repeating(
        2,
        constraint=Constraint("regex", "(abc){6}d"),
        sampling=SamplingParams(logit_bias={}),
        stopping=None,
    )
    said = new_loop(tokenizer)
    answers(said, [without(request)])
    last = said.token_ids("0")[-1]
    stopping = StoppingParams(max_new_tokens=60, min_new_tokens=60, stop_token_ids=(last,))
    found = []
    for each in (replace(request, stopping=stopping), without(replace(request, stopping=stopping))):
        loop = new_loop(tokenizer)
        found.append(answers(loop, [each]))
        assert isinstance(loop.error("0"), NoTokenAllowedError)
    assert found[0] == found[1]
    assert found[0][0][2]


def test_drafts_that_the_constraint_forbids_are_not_run(tokenizer: Tokenizer) -> None:
    """Its own prompt is in no language: but for what the language forbids, each step would draft from it."""
    loop = new_loop(tokenizer)
    grammar = loop._grammar_of(OPEN)
    allowed = {
        int(token)
        for token in np.flatnonzero(np.unpackbits(grammar.first_mask.view(np.uint8), bitorder="little"))
    }
    seen: list[int] = []
    loop.decoder.before_forward = lambda plan: seen.extend(
        plan.token_ids[1:].tolist() if plan.num_rows > 1 and plan.positions[0] > 9 else []
    )
    answers(loop, [repeating(3, constraint=OPEN)])
    assert seen, "nothing was drafted"
    assert set(seen) <= allowed


def test_no_draft_preempts_or_evicts_anybody(tokenizer: Tokenizer) -> None:
    """The pool is just as large as the answer: the last drafts find no block."""
    request = repeating(1, new_tokens=40)
    loop = new_loop(tokenizer, num_blocks=49, block_size=1)
    assert answers(loop, [request]) == answers(new_loop(tokenizer), [without(request)])
    assert sum(stats.num_preempted for stats in loop.stats) == 0
    assert num_drafts(loop)[1] > 0


def test_a_step_with_drafts_has_few_rows_and_fewer_beside_others(tokenizer: Tokenizer) -> None:
    config = SchedulerConfig(
        max_num_sequences=16, max_num_batched_tokens=64, max_waiting=20, max_draft_rows=8
    )
    for others, limit in (((), 8), ((False,), 4), ((True,), 8), ((True, True, False), 4), ((True,) * 7, 8)):
        loop = new_loop(tokenizer, config=config)
        requests = [repeating(seed + 1) for seed, drafts in enumerate((True, *others))]
        requests = [
            each if drafts else without(each) for each, drafts in zip(requests, (True, *others), strict=True)
        ]
        for index, request in enumerate(requests):
            loop.generate(str(index), request)
        loop.drain()
        drafting = [s for s in loop.stats if s.num_draft_tokens]
        # Where all draft, one may still have nothing to propose; then its step counts as one beside others.
        together = [s for s in drafting if s.num_decode_tokens == len(requests)]
        assert all(s.num_decode_tokens + s.num_draft_tokens <= 8 for s in drafting)
        assert all(s.num_decode_tokens + s.num_draft_tokens <= limit for s in together)
        assert bool(together) == (len(requests) < limit)


def test_nobody_drafts_while_a_prompt_is_computed(tokenizer: Tokenizer) -> None:
    loop = new_loop(tokenizer)
    loop.generate("drafts", repeating(1))
    for seed in range(5):
        loop.generate(str(seed), make_request(prompt(seed + 10, 60), new_tokens=1))
    loop.drain()
    assert all(stats.num_draft_tokens == 0 for stats in loop.stats if stats.num_prefill_tokens > 8)
    assert any(stats.num_draft_tokens for stats in loop.stats)


def test_what_was_guessed_wrong_is_not_in_the_prefix_cache(tokenizer: Tokenizer) -> None:
    """Later requests continue each beginning of the answer, and are computed on the blocks that it left."""
    loop = new_loop(tokenizer, block_size=2, num_blocks=400)
    sampling = SamplingParams(temperature=0.6, seed=1)
    answers(loop, [repeating(1, sampling=sampling)])
    drafted, accepted = num_drafts(loop)
    assert accepted < drafted
    whole = prompt(1) + loop.token_ids("0")
    requests = [make_request(whole[:end], new_tokens=3) for end in range(len(prompt(1)), len(whole), 5)]
    fresh = new_loop(tokenizer, num_blocks=400)
    for index, request in enumerate(requests):
        for each in (loop, fresh):
            each.generate(f"later {index}", request)
            each.drain()
        assert loop.token_ids(f"later {index}") == fresh.token_ids(f"later {index}")
    assert sum(stats.prefix_cache_hits for stats in loop.stats) > 5 * len(whole)


def test_an_answer_that_is_cancelled_paused_or_out_of_time_frees_everything(tokenizer: Tokenizer) -> None:
    loop = new_loop(tokenizer)
    loop.generate("cancelled", repeating(1, new_tokens=100))
    loop.generate("late", repeating(2, new_tokens=100, deadline_s=0.0))
    limited = StoppingParams(max_new_tokens=100, time_limit_s=1e-4)
    loop.generate("limited", replace(repeating(3), stopping=limited))
    for _ in range(20):
        loop.step()
    loop.cancel("cancelled")
    loop.drain()
    assert loop.finish_reason("limited") is FinishReason.TIME_LIMIT
    assert loop.steps.scheduler.num_running == 0


@pytest.mark.parametrize("num_tokens", [-1, MAX_DRAFT_TOKENS + 1])
def test_a_number_out_of_range_is_refused(num_tokens: int) -> None:
    with pytest.raises(
        FieldInvalidError, match=rf"speculation.num_tokens: must be in \[0, 16\], not {num_tokens}"
    ):
        SpeculationParams(num_tokens=num_tokens)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(frequency_penalty=0.3, presence_penalty=0.5),
        SamplingParams(frequency_penalty=0.4, temperature=0.2, seed=4),
    ],
)
def test_a_draft_counts_as_said_for_what_follows_it(tokenizer: Tokenizer, sampling: SamplingParams) -> None:
    """The prompt goes round and round, and the answer would, too, if it were not penalized for it."""
    plain, loop = new_loop(tokenizer), new_loop(tokenizer)
    circling = prompt(1) + plain.decoder.greedy(prompt(1), 60)
    request = replace(repeating(1, new_tokens=40, sampling=sampling), prompt_token_ids=tuple(circling))
    assert answers(loop, [request]) == answers(plain, [without(request)])
    assert num_drafts(loop)[1] > 2
    assert loop.token_ids("0") != loop.decoder.greedy(circling, 40)
