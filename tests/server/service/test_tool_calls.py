"""Calls of tools in answers: valid by construction where they are required, and read as the families write them."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from manyhats.engine.engine import Engine
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.output import FinishReason, StepOutput, TokenOutput, Usage
from manyhats.engine.request import SamplingParams, StoppingParams
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.service.tool_calls import AnswerPiece, CallReader
from manyhats.server.service.tool_use import ToolUse
from support.factories.spaced_tokenizers import MARK, spaced_tokenizer
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint, save_tokenizer
from support.factories.tool_models import CLOCK, FAMILIES, WEATHER, Tool, tools
from support.harnesses.engine import Answer, collect, load_tiny, make_request, random_ids, running_engine
from support.harnesses.grammars import allowed_ids, grammar_of

NUM_AT_ONCE = 16
EOS = 2
BOTH = (WEATHER, CLOCK)
RAIN = '{"city": "A\\"}", "days": 3}'


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


def tokenizer_of(family: str) -> Tokenizer:
    made = FAMILIES[family]
    return Tokenizer(made.tokenizer(), special_tokens={}, chat_template=made.template)


def calls_of(pieces: Iterable[AnswerPiece]) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    calls: list[tuple[str, str]] = []
    for piece in (call for each in pieces for call in each.calls):
        if piece.id:
            assert re.fullmatch("call_[0-9a-f]{24}", piece.id)
            assert (piece.index, piece.arguments) == (len(calls), "")
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_every_finished_required_call_is_valid(
    family: str, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = make_checkpoint(tmp_path_factory.mktemp("tools") / "model", seed=4)
    save_tokenizer(directory, FAMILIES[family].tokenizer(), chat_template=FAMILIES[family].template)
    model = load_tiny(directory)
    counts = {"finished": 0, "cut": 0}

    async def answers(engine: Engine, uses: Sequence[ToolUse]) -> list[Any]:
        requests = (
            make_request(
                random_ids(index, 5, 256),
                constraint=use.constraint(model.tokenizer, engine.eos_token_ids()),
                sampling=SamplingParams(temperature=1.0, seed=index),
                stopping=StoppingParams(max_new_tokens=250),
            )
            for index, use in enumerate(uses)
        )
        return await asyncio.gather(*(collect(engine, each) for each in requests), return_exceptions=True)

    def check(engine: Engine, many: Sequence[Sequence[Tool]]) -> None:
        uses = [
            ToolUse(tools=each, choice="required", is_parallel=bool(index % 3))
            for index, each in enumerate(many)
        ]
        for use, answer in zip(uses, runner.run(answers(engine, uses)), strict=True):
            if isinstance(answer, FieldInvalidError):  # the library cannot do some schemas
                continue
            assert isinstance(answer, Answer), answer
            is_cut = answer.finish_reason is FinishReason.LENGTH
            counts["cut" if is_cut else "finished"] += 1
            _check_calls(model.tokenizer, use, answer)

    @settings(
        max_examples=1,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(tools(), min_size=NUM_AT_ONCE, max_size=NUM_AT_ONCE))
    def check_all(many: list[Sequence[Tool]]) -> None:
        check(engine, many)

    stack = AsyncExitStack()
    engine = runner.run(stack.enter_async_context(running_engine(model, max_num_sequences=NUM_AT_ONCE)))
    try:
        check_all()
    finally:
        runner.run(stack.aclose())
    assert counts["finished"] >= 6, counts


def _check_calls(tokenizer: Tokenizer, use: ToolUse, answer: Answer) -> None:
    reader = CallReader(use, tokenizer, StoppingParams(), skip_special_tokens=True)
    pieces = [reader.push(output) for output in answer.outputs]
    assert not any(piece.text for piece in pieces)
    calls = calls_of(pieces)
    is_cut = answer.finish_reason is FinishReason.LENGTH
    assert reader.ends_in_calls(answer.finish_reason) is not is_cut
    assert is_cut or (calls and (use.is_parallel or len(calls) == 1))
    schemas = {each.name: json.loads(each.schema) for each in use.functions}
    for name, arguments in calls[:-1] if is_cut else calls:
        jsonschema.Draft202012Validator(
            schemas[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        ).validate(json.loads(arguments))


def outputs_of(tokenizer: Tokenizer, ids: Sequence[int], seed: int) -> list[StepOutput]:
    """An engine's outputs for these tokens; their text lags behind by chance, as if it might begin a stop sequence."""
    generator, stream, held = random.Random(seed), tokenizer.stream(), ""
    outputs = []
    at = 0
    while at < len(ids):
        some = ids[at : at + generator.randint(1, 3)]
        at += len(some)
        held += "".join(map(stream.push, some))
        is_last = at >= len(ids)
        cut = len(held) - (0 if is_last else generator.randint(0, min(3, len(held))))
        text, held = held[:cut], held[cut:]
        tokens = tuple(TokenOutput(each, tokenizer.piece(each)) for each in some)
        reason = FinishReason.EOS if is_last else None
        outputs.append(
            StepOutput(text + (stream.flush() if is_last else ""), tokens, (), reason, Usage(), 0.0)
        )
    return outputs


def read(
    family: str, text: str, *, seed: int = 0, choice: Any = "auto", in_pieces: bool = False
) -> tuple[str, list[tuple[str, str]], bool]:
    """Text and calls of an answer that says ``text``, if its language allows that, and whether it ends in calls."""
    tokenizer, use = tokenizer_of(family), ToolUse(tools=BOTH, choice=choice)
    ids: list[int] = []
    for piece in text if in_pieces else [text]:
        ids += tokenizer.encode(piece, add_special_tokens=False)
    constraint = use.constraint(tokenizer, {EOS})
    matcher = grammar_of(constraint, tokenizer, TINY_VOCAB_SIZE, {EOS}).matcher()
    for index, token_id in enumerate(ids):
        assert matcher.advance(token_id), tokenizer.text(ids[: index + 1])
    assert matcher.may_end
    reader = CallReader(use, tokenizer, StoppingParams(), skip_special_tokens=True)
    pieces = [reader.push(output) for output in outputs_of(tokenizer, ids, seed)]
    return "".join(piece.text for piece in pieces), calls_of(pieces), reader.ends_in_calls(FinishReason.EOS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_text_and_calls_are_told_apart(family: str, seed: int) -> None:
    made = FAMILIES[family]
    rain = ("weather", RAIN)
    assert read(family, "It rains. {}", seed=seed) == ("It rains. {}", [], False)
    assert read(family, made.calls(rain), seed=seed) == ("", [rain], True)
    if made.opening:
        assert read(family, "Let's see ü\n" + made.calls(rain), seed=seed) == ("Let's see ü\n", [rain], True)
    if made.separator is not None:
        several = [rain, ("clock", "{}"), ("weather", '{"city":\n  "ü" }')]
        assert read(family, made.calls(*several), seed=seed) == ("", several, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_only_looks_like_a_call_stays_text(family: str) -> None:
    made = FAMILIES[family]
    # Where the opening is a token, its letters are not; where nothing opens a call, only a whole one is.
    in_pieces = bool(made.tokens)
    texts = [made.calls(("rain", "{}"))] if made.tokens or not made.opening else []
    texts += [
        made.opening[:-1],
        "tool_call>",
        '{"name": "weather"',
        " " + made.call,
        '{"name": "clock", "x": 1}',
    ]
    for text in texts:
        assert read(family, text, in_pieces=in_pieces) == (text, [], False)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_call_is_in_the_language(family: str) -> None:
    made = FAMILIES[family]
    for name, arguments in (("weather", '{"days": 3}'), ("clock", '{"a": 1}'), ("weather", "[]")):
        for choice in ("auto", "required"):
            with pytest.raises(AssertionError):
                read(family, made.calls((name, arguments)), choice=choice)
    with pytest.raises(AssertionError):
        read(family, "It rains.", choice="required")
    with pytest.raises(AssertionError):
        read(family, made.calls(("clock", "{}")) + " Well.")


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.tokens])
def test_free_text_may_have_any_token(family: str) -> None:
    tokenizer = tokenizer_of(family)
    constraint = ToolUse(tools=BOTH, choice="auto").constraint(tokenizer, {EOS})
    matcher = grammar_of(constraint, tokenizer, TINY_VOCAB_SIZE, {EOS}).matcher()
    generator = random.Random(2)
    opening = tokenizer.token_id(FAMILIES[family].tokens[0])
    for _ in range(50):
        assert set(range(tokenizer.vocab_size)) <= allowed_ids(matcher, TINY_VOCAB_SIZE)
        others = [each for each in range(tokenizer.vocab_size) if each not in (opening, EOS)]
        assert matcher.advance(generator.choice(others))


def test_one_call_is_the_last_where_several_are_not_wanted() -> None:
    tokenizer = tokenizer_of("hermes")
    for is_parallel, more in ((True, {EOS, tokenizer.token_id("\u010a")}), (False, {EOS})):
        use = ToolUse(tools=BOTH, choice="required", is_parallel=is_parallel)
        grammar = grammar_of(use.constraint(tokenizer, {EOS}), tokenizer, TINY_VOCAB_SIZE, {EOS})
        matcher = grammar.matcher()
        for token_id in tokenizer.encode(FAMILIES["hermes"].calls(("clock", "{}")), add_special_tokens=False):
            assert matcher.advance(token_id)
        assert allowed_ids(matcher, TINY_VOCAB_SIZE) == more


@pytest.mark.parametrize("kind", ["bpe-prepend", "bpe-metaspace-first", "unigram-metaspace-always"])
@pytest.mark.parametrize("opening", ["[TOOL_CALLS]", None])
def test_the_text_is_what_it_would_be_without_tools(kind: str, opening: str | None) -> None:
    """On tokenizers whose texts lose their first space, and with special tokens in it, which are not shown."""
    backend = spaced_tokenizer(kind, single="")
    ahead = backend.encode("It is<s> Paris , not  Rome !").ids
    letters = 'abcdeghilmnoprstuwy{}[]<>/_"\\\n:,'
    backend.add_tokens([AddedToken(each, normalized=False) for each in letters])
    if opening:
        backend.add_special_tokens([AddedToken(opening, special=True, normalized=False)])
    family = FAMILIES["mistral" if opening else "hermes, as text"]
    tokenizer = Tokenizer(backend, special_tokens={}, chat_template=family.template, cleans_up_spaces=True)
    arguments = '{"city": "a , b"}'
    call = family.calls(("weather", arguments)).removeprefix(opening or "")
    ids = [*ahead, *([tokenizer.token_id(opening)] if opening else [])]
    ids += [tokenizer.token_id(MARK if each == " " else each) for each in call]
    reader = CallReader(
        ToolUse(tools=BOTH, choice="auto"), tokenizer, StoppingParams(), skip_special_tokens=True
    )
    pieces = [reader.push(output) for output in outputs_of(tokenizer, ids, 1)]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ahead)
    assert tokenizer.decode(ahead).endswith(" Paris, not  Rome!")
    assert calls_of(pieces) == [("weather", arguments)]


def test_a_cut_call_has_the_arguments_that_there_are() -> None:
    tokenizer = tokenizer_of("hermes")
    text = "Well." + FAMILIES["hermes"].calls(("weather", RAIN))
    ids = tokenizer.encode(text[: text.index("days")], add_special_tokens=False)
    reader = CallReader(
        ToolUse(tools=BOTH, choice="auto"), tokenizer, StoppingParams(), skip_special_tokens=True
    )
    pieces = [reader.push(output) for output in outputs_of(tokenizer, ids, 1)]
    assert calls_of(pieces) == [("weather", RAIN[: RAIN.index("days")])]
    assert not reader.ends_in_calls(FinishReason.LENGTH)
    assert not reader.ends_in_calls(FinishReason.STOP_SEQUENCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stop", "keeps"), [('"days', True), ('"days', False), (' "d', False), ("}", False)])
def test_a_stop_sequence_cuts_a_call(family: str, stop: str, keeps: bool) -> None:
    tokenizer = tokenizer_of(family)
    text = FAMILIES[family].calls(("weather", '{"city": "", "days": 3}'))
    start = text.index(stop)
    stopping = StoppingParams(stop_sequences=[stop], include_stop_sequence=keeps)
    reader = CallReader(ToolUse(tools=BOTH, choice="auto"), tokenizer, stopping, skip_special_tokens=True)
    ids = tokenizer.encode(text[: start + len(stop)], add_special_tokens=False)
    outputs = outputs_of(tokenizer, ids, 1)
    outputs[-1] = replace(outputs[-1], stop=stop, finish_reason=FinishReason.STOP_SEQUENCE)
    pieces = [reader.push(output) for output in outputs]
    cut = text[: start + len(stop) * keeps]
    assert calls_of(pieces) == [("weather", cut[cut.index('{"city') :])]
    assert not reader.ends_in_calls(FinishReason.STOP_SEQUENCE)
