"""Stop sequences that are or contain special tokens, as transformers' ``stop_strings`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.output import FinishReason
from manyhats.engine.request import ResponseOptions, StoppingParams
from manyhats.engine.text.stopping import StopChecker
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.saying_model import make_saying_checkpoint
from support.factories.tiny_models import save_tokenizer, tiny_tokenizer
from support.harnesses.engine import collect, load_tiny, make_request, running_engine
from support.oracles.transformers import load_transformers

EOT, TURN, TOOL = "<|eot|>", "<|turn|>", "<tool>"
SAID = ("h", "e", "l", "o", EOT, TURN, "A", TOOL, "B", "<|im_end|>", "C")
SPECIAL = {EOT, TURN, "<|im_end|>", "<|im_start|>", "<|endoftext|>"}


def backend() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (EOT, TURN)])
    tokenizer.add_tokens([AddedToken(TOOL, special=False, normalized=False)])
    return tokenizer


def ids_of(tokens: Sequence[str]) -> list[int]:
    found = [backend().token_to_id(token) for token in tokens]
    assert None not in found
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_saying_checkpoint(tmp_path_factory.mktemp("stops") / "model", ids_of(SAID), backend())


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_tiny(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return load_transformers(directory)


@pytest.fixture(scope="module")
def their_tokenizer(directory: Path) -> Any:
    transformers: Any = import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def shown(tokens: Sequence[str], stops: Sequence[str], *, skip: bool, include: bool) -> str:
    """The text of an answer that the first complete one of ``stops`` ended, if any is complete."""
    literal = "".join(tokens)
    ends = [(literal.find(stop) + len(stop), literal.find(stop)) for stop in stops if stop in literal]
    end, start = min(ends, default=(len(literal), len(literal)))
    text, position = "", 0
    for token in tokens:
        part = token[: max(0, (end if include else start) - position)]
        text += "" if skip and token in SPECIAL else part
        position += len(token)
    return text


@pytest.mark.parametrize(
    "stops",
    [
        (EOT,),
        (TURN,),
        ("<|im_end|>",),
        ("o" + EOT,),
        (EOT + TURN,),
        (EOT + TURN + "A",),
        ("lo" + EOT + TURN + "A" + TOOL,),
        ("eot",),
        ("<|t",),
        ("|><|",),
        ("|>A",),
        (TOOL,),
        ("A" + TOOL + "B",),
        ("B<|im_end|>C",),
        ("never", TURN),
        (TURN + "A", "o<|eot|><|t"),
        ("h",),
        ("C",),
        ("oA",),
        ("<|eot|>A",),
        ("never",),
    ],
)
async def test_an_answer_ends_where_stop_strings_end_it(
    model: LoadedModel, theirs: Any, their_tokenizer: Any, stops: tuple[str, ...]
) -> None:
    prompt = torch.tensor([ids_of(["x"])])
    with torch.no_grad():
        said = theirs.generate(
            prompt,
            max_new_tokens=len(SAID),
            do_sample=False,
            eos_token_id=None,
            stop_strings=list(stops),
            tokenizer=their_tokenizer,
        )
    expected = said[0, 1:].tolist()
    tokens = [backend().id_to_token(token_id) for token_id in expected]
    is_stopped = any(stop in "".join(tokens) for stop in stops)
    async with running_engine(model) as engine:
        for skip in (True, False):
            for include in (True, False):
                stopping = StoppingParams(
                    max_new_tokens=len(SAID),
                    stop_sequences=stops,
                    include_stop_sequence=include,
                    ignore_eos=True,
                )
                response = ResponseOptions(skip_special_tokens=skip)
                answer = await collect(
                    engine, make_request(ids_of(["x"]), stopping=stopping, response=response)
                )
                reason = FinishReason.STOP_SEQUENCE if is_stopped else FinishReason.LENGTH
                assert (answer.token_ids, answer.finish_reason) == (expected, reason)
                assert answer.text == shown(tokens, stops, skip=skip, include=include)


@pytest.mark.parametrize("skip", [True, False])
async def test_a_special_token_may_end_an_answer_at_its_first_token(tmp_path: Path, skip: bool) -> None:
    model = load_tiny(make_saying_checkpoint(tmp_path / "model", ids_of([EOT, "a"]), backend()))
    stopping = StoppingParams(max_new_tokens=4, stop_sequences=(EOT,))
    async with running_engine(model) as engine:
        request = make_request(
            ids_of(["x"]), stopping=stopping, response=ResponseOptions(skip_special_tokens=skip)
        )
        answer = await collect(engine, request)
    assert (answer.token_ids, answer.text) == (ids_of([EOT]), "")
    assert answer.finish_reason is FinishReason.STOP_SEQUENCE


@pytest.mark.parametrize(("skip", "text"), [(True, "heloA<tool>B"), (False, "helo<|eot|><|turn|>A<tool>B")])
async def test_the_text_shows_special_tokens_where_asked_to_but_never_the_eos_that_ended_it(
    model: LoadedModel, skip: bool, text: str
) -> None:
    response = ResponseOptions(skip_special_tokens=skip)
    async with running_engine(model) as engine:
        request = make_request(ids_of(["x"]), stopping=StoppingParams(), response=response)
        answer = await collect(engine, request)
    assert (answer.text, answer.finish_reason) == (text, FinishReason.EOS)
    assert answer.token_ids == ids_of(SAID[:10])


async def test_a_special_stop_before_min_new_tokens_ends_nothing(model: LoadedModel) -> None:
    stopping = StoppingParams(max_new_tokens=20, min_new_tokens=8, stop_sequences=(EOT,), ignore_eos=True)
    async with running_engine(model) as engine:
        answer = await collect(engine, make_request(ids_of(["x"]), stopping=stopping))
    assert answer.token_ids == ids_of([*SAID, *SAID[:5]])
    assert answer.text == "heloA<tool>BChelo"


def text_by_stream(
    tokenizer: Tokenizer, ids: Sequence[int], params: StoppingParams, *, skip: bool = True
) -> tuple[str, int | None]:
    """The text of ids that a model says, and after how many of them a stop sequence ended it."""
    watched, visible = tokenizer.stream(skip_special_tokens=False), tokenizer.stream(skip_special_tokens=skip)
    checker, text = StopChecker(params, frozenset()), ""
    for count, token_id in enumerate(ids, start=1):
        delta, reason = checker.push(token_id, watched.push(token_id), count, visible.push(token_id))
        text += delta
        if reason is not None:
            return text, count
    return text + checker.flush() + visible.flush(), None


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_stop_sequences_end_any_tokens_where_stop_strings_do(
    data: st.DataObject, tokenizer: Tokenizer, their_tokenizer: Any
) -> None:
    stopping: Any = import_module("transformers.generation.stopping_criteria")
    said = data.draw(st.lists(st.sampled_from([*SPECIAL, TOOL, "a", "b", "|"]), min_size=1, max_size=8))
    literal = "".join(said)
    spans = st.tuples(st.integers(0, len(literal) - 1), st.integers(1, 12))
    stops = [
        literal[start : start + length]
        for start, length in data.draw(st.lists(spans, min_size=1, max_size=3))
    ]
    ids = [backend().token_to_id(token) for token in said]
    criterion = stopping.StopStringCriteria(their_tokenizer, stops)
    reached = (bool(criterion(torch.tensor([ids[:n]]), None).all()) for n in range(1, len(ids) + 1))
    ended = next((n for n, is_done in enumerate(reached, start=1) if is_done), None)
    for include in (True, False):
        params = StoppingParams(
            max_new_tokens=100, stop_sequences=tuple(stops), include_stop_sequence=include
        )
        for skip in (True, False):
            text, count = text_by_stream(tokenizer, ids, params, skip=skip)
            assert count == ended
            assert text == shown(said, stops, skip=skip, include=include)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(["a", "é", "€", "😀", EOT, TURN, TOOL]), max_size=8))
@example(parts=["é", EOT, "é"])
def test_streams_with_and_without_special_tokens_are_the_whole_decoded(
    tokenizer: Tokenizer, their_tokenizer: Any, parts: list[str]
) -> None:
    ids = [i for part in parts for i in backend().encode(part, add_special_tokens=False).ids]
    for skip in (True, False):
        stream = tokenizer.stream(skip_special_tokens=skip)
        text = "".join(map(stream.push, ids)) + stream.flush()
        assert text == their_tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_half_character_around_a_hidden_token_is_not_lost(tokenizer: Tokenizer) -> None:
    first, *rest = backend().encode("€", add_special_tokens=False).ids
    params = StoppingParams(max_new_tokens=100, stop_sequences=("a",))
    ids = [first, *ids_of([EOT]), *rest, *ids_of(["a"])]
    assert text_by_stream(tokenizer, ids, params) == ("€", len(ids))


def test_sentencepiece_text_is_watched_with_literals(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s"]
    made = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([AddedToken(text, special=True) for text in words[:3]])
    save_tokenizer(tmp_path, made, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = [made.token_to_id(token) for token in ("▁the", "▁cat", "</s>", "▁the", "s")]
    for stop, text in (
        (" cat</s>", "the"),
        ("</s>", "the cat"),
        ("</s> the", "the cat"),
        ("thes", "the cat "),
    ):
        params = StoppingParams(max_new_tokens=100, stop_sequences=(stop,))
        assert text_by_stream(tokenizer, ids, params)[0] == text
