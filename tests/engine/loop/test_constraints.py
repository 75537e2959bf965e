"""Rows with a constraint, among others, in an engine whose logits are a hash of what was read."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest

from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError, NoTokenAllowedError
from manyhats.engine.output import FinishReason, StepOutput
from manyhats.engine.request import Request, ResponseOptions, SamplingParams, StoppingParams
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import EOS_TOKEN_ID, TINY_VOCAB_SIZE
from support.harnesses.engine import make_request
from support.harnesses.engine_loop import POISON, Loop, prompt
from support.harnesses.grammars import allowed_ids

WORDS = Constraint("regex", "[a-d]{2,6}( [a-d]{2,6}){3}")
OPEN = Constraint("regex", "[a-z ]*")
SCHEMA = Constraint(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 6},
                "age": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)
RANDOM = SamplingParams(temperature=1.0, seed=7)


def constrained(seed: int, constraint: Constraint, max_new_tokens: int = 200, **fields: object) -> Request:
    stopping = {key: fields.pop(key) for key in tuple(fields) if key in StoppingParams.__slots__}
    return make_request(
        prompt(seed),
        constraint=constraint,
        stopping=StoppingParams(max_new_tokens=max_new_tokens, **stopping),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def run(loop: Loop, *requests: Request) -> None:
    for index, request in enumerate(requests):
        loop.generate(str(index), request)
    loop.drain()


@pytest.mark.parametrize("sampling", [SamplingParams(), RANDOM])
def test_answers_are_in_their_language(loop: Loop, sampling: SamplingParams) -> None:
    run(loop, *(constrained(seed, each, sampling=sampling) for seed in range(4) for each in (WORDS, SCHEMA)))
    for index in range(0, 8, 2):
        assert re.fullmatch(WORDS.texts[0], loop.text(str(index)))
        answer = json.loads(loop.text(str(index + 1)))
        assert set(answer) == {"name", "age"}
        assert 0 <= answer["age"] <= 99
        assert len(answer["name"]) <= 6
        assert loop.finish_reason(str(index)) is loop.finish_reason(str(index + 1)) is FinishReason.EOS


def test_a_greedy_answer_takes_the_best_allowed_token_each_time(loop: Loop) -> None:
    run(loop, constrained(1, SCHEMA, response=ResponseOptions(logprobs=True)))
    matcher = loop.grammars[SCHEMA.digest].matcher()
    history = np.array(prompt(1), dtype=np.int64)
    outputs = [event.payload for event in loop.events["0"]]
    tokens = [token for output in outputs if isinstance(output, StepOutput) for token in output.tokens]
    for token in tokens:
        logits = loop.decoder.logits(history).double()
        allowed = sorted(allowed_ids(matcher, TINY_VOCAB_SIZE))
        assert token.id == allowed[int(logits[allowed].argmax())]
        # What is reported is of the raw logits, as without a constraint.
        assert token.logprob == pytest.approx(float(logits.log_softmax(0)[token.id]), abs=1e-5)
        assert token.rank == 1 + int((logits > logits[token.id]).sum())
        history = np.append(history, token.id)
        if token.id != EOS_TOKEN_ID:
            assert matcher.advance(token.id)


def test_an_answer_that_nothing_can_follow_ends_with_its_last_token(loop: Loop, tokenizer: Tokenizer) -> None:
    run(loop, constrained(1, Constraint("choice", ("yes", "no"))), constrained(2, SCHEMA))
    assert loop.text("0") in ("yes", "no")
    for name in "01":
        assert loop.finish_reason(name) is FinishReason.EOS
        assert EOS_TOKEN_ID not in loop.token_ids(name)
        assert tokenizer.decode(loop.token_ids(name)) == loop.text(name)


def test_an_answer_that_could_go_on_ends_where_the_model_ends_it(loop: Loop) -> None:
    run(loop, *(constrained(seed, OPEN, sampling=RANDOM) for seed in range(6)))
    for name in map(str, range(6)):
        assert re.fullmatch("[a-z ]*", loop.text(name))
        assert loop.finish_reason(name) is FinishReason.EOS
        assert loop.token_ids(name)[-1] == EOS_TOKEN_ID


@pytest.mark.parametrize("stopping", [{"min_new_tokens": 60}, {"ignore_eos": True}])
def test_a_complete_answer_ends_whatever_else_was_asked(loop: Loop, stopping: dict[str, object]) -> None:
    empty = Constraint("regex", "a{0}")
    run(
        loop,
        constrained(1, SCHEMA, **stopping),
        constrained(2, OPEN, 80, **stopping),
        constrained(3, empty, **stopping),
    )
    assert json.loads(loop.text("0"))
    assert loop.finish_reason("0") is loop.finish_reason("2") is FinishReason.EOS
    assert loop.text("2") == ""
    # This one could go on, so it does, and no EOS comes into its text.
    assert len(loop.token_ids("1")) >= 60
    assert EOS_TOKEN_ID not in loop.token_ids("1")[:60]
    assert re.fullmatch("[a-z ]*", loop.text("1"))


def test_an_answer_cut_short_is_the_beginning_of_a_whole_one(loop: Loop) -> None:
    text = Constraint("choice", ("éü and then the end", "ßé and then another end"))
    run(loop, constrained(1, text))
    whole = loop.text("0")
    assert loop.finish_reason("0") is FinishReason.EOS
    num_tokens = len(loop.token_ids("0"))
    for limit in range(1, num_tokens + 1):
        name = loop.generate(f"cut{limit}", constrained(1, text, limit))
        loop.drain()
        assert loop.finish_reason(name) is (FinishReason.EOS if limit == num_tokens else FinishReason.LENGTH)
        assert whole.startswith(loop.text(name))  # without half a character
        assert loop.text(name) == whole or limit < num_tokens


def test_stop_sequences_stay_active(loop: Loop) -> None:
    run(loop, constrained(1, WORDS))
    whole = loop.text("0")
    loop.generate("stopped", constrained(1, WORDS, stop_sequences=(" ",)))
    loop.drain()
    assert loop.text("stopped") == whole.split(" ")[0]
    assert loop.finish_reason("stopped") is FinishReason.STOP_SEQUENCE


def test_a_constrained_row_changes_no_token_of_its_neighbours(loop: Loop) -> None:
    sampled = make_request(prompt(2), new_tokens=30, sampling=RANDOM)
    run(loop, make_request(prompt(1), new_tokens=30), sampled, constrained(3, SCHEMA), constrained(4, WORDS))
    assert loop.token_ids("0") == loop.decoder.greedy(prompt(1), 30)
    alone = Loop(loop.tokenizer)
    run(alone, make_request(prompt(1), new_tokens=1), sampled)
    assert alone.token_ids("1") == loop.token_ids("1")


def test_preempted_answers_are_the_same(tokenizer: Tokenizer) -> None:
    requests = [
        constrained(seed, each, 40, sampling=RANDOM) for seed, each in enumerate([WORDS, SCHEMA, OPEN] * 2)
    ]
    calm = Loop(tokenizer, num_blocks=200)
    crowded = Loop(
        tokenizer,
        num_blocks=18,
        config=SchedulerConfig(max_num_sequences=8, max_num_batched_tokens=16, max_waiting=20),
    )
    for loop in (calm, crowded):
        run(loop, *requests)
    assert sum(stats.num_preempted for stats in crowded.stats) > 0
    for name in map(str, range(len(requests))):
        assert crowded.token_ids(name) == calm.token_ids(name)


def test_a_row_without_an_allowed_token_ends_alone(loop: Loop) -> None:
    ban = SamplingParams(temperature=1.0, logit_bias={})
    letters = [loop.tokenizer.token_id(letter) for letter in "ab"]
    word = Constraint("regex", "[ab]{5}")
    stuck = constrained(1, word, stop_token_ids=letters, min_new_tokens=3, sampling=ban)
    run(loop, stuck, constrained(2, word))
    assert isinstance(loop.error("0"), NoTokenAllowedError)
    assert re.fullmatch("[ab]{5}", loop.text("1"))


def test_a_matcher_that_fails_ends_its_row_alone(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhats.engine.sampling.matcher import Matcher

    mask, calls = Matcher.mask, itertools.count()

    def failing(self: Matcher, into: object) -> bool:
        if next(calls) == 6:
            raise FieldInvalidError("regex", "cannot be followed")
        return mask(self, into)  # type: ignore[arg-type]

    monkeypatch.setattr(Matcher, "mask", failing)
    run(loop, *(constrained(seed, WORDS) for seed in range(3)), make_request(prompt(4), new_tokens=6))
    failed = [name for name in "012" if isinstance(loop.events[name][-1].payload, FieldInvalidError)]
    assert len(failed) == 1
    assert loop.token_ids("3") == loop.decoder.greedy(prompt(4), 6)
    for name in set("012") - set(failed):
        assert re.fullmatch(WORDS.texts[0], loop.text(name))


def test_logits_that_are_not_finite_end_a_constrained_row(loop: Loop) -> None:
    loop.generate("bad", make_request([*prompt(1), POISON], constraint=WORDS))
    loop.drain()
    assert "not finite" in str(loop.error("bad"))
