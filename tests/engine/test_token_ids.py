"""Ids that are no token of the model: those of its files are dropped with a note, those of a caller are refused."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.loop.serving import check_generation, check_scoring
from manyhats.engine.request import Request, SamplingParams, ScoreRequest, StoppingParams
from support.factories.tiny_models import EOS_TOKEN_ID, make_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, random_ids, running_engine

V = 320
NO_TOKENS = [
    V,
    V + 1,
    2 * V,
    49_152,
    2**31 - 1,
    2**31,
    2**31 + 7,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
]
NEGATIVE = [-1, -2, -V, -V - 1, -(2**31), -(2**63), -(10**30)]
NO_IDS: list[Any] = ["2", 2.0, True, False, [2], {"id": 2}, ""]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ids") / "model", seed=13)


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_tiny(directory)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "model"))


def eos_with(directory: Path, tmp_path: Path, file: str, value: Any) -> tuple[frozenset[int], list[Any]]:
    """The EOS ids of a model one of whose files names ``value``, and the notes that were written."""
    copy = copied(directory, tmp_path)
    if file == "config.json":
        (copy / "generation_config.json").unlink()
    edit_json(copy / file, eos_token_id=value)
    with capture_logs() as logs:
        loaded = load_tiny(copy)
    return loaded.generation.eos_token_ids, [log for log in logs if "not tokens of the model" in log["event"]]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ids_that_are_no_token_end_and_forbid_nothing(directory: Path, tmp_path: Path, file: str) -> None:
    wrong = [*NO_TOKENS, *NEGATIVE, *NO_IDS]
    ids, (note,) = eos_with(directory, tmp_path, file, [7, *wrong, EOS_TOKEN_ID])
    assert ids >= {7, EOS_TOKEN_ID}
    assert all(type(each) is int and 0 <= each < V for each in ids)
    assert note["source"].startswith(file)
    assert note["limit"] == V
    assert set(map(str, note["ids"])) <= set(map(str, wrong))


@pytest.mark.parametrize("value", [V, -1, 2**31, "2", [V, -1]])
def test_where_no_id_is_left_the_next_file_says_what_ends_a_generation(
    directory: Path, tmp_path: Path, value: Any
) -> None:
    ids, notes = eos_with(directory, tmp_path, "generation_config.json", value)
    assert ids == {EOS_TOKEN_ID}
    assert len(notes) == 1


@pytest.mark.parametrize("wrong", [V, -1, 2**31])
async def test_with_min_new_tokens_the_answer_is_that_of_transformers(
    directory: Path, tmp_path: Path, wrong: int
) -> None:
    copy = copied(directory, tmp_path)
    prompt = random_ids(3, 9, V)
    transformers: Any = import_module("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(copy)
    whole = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        eos_token_id=[EOS_TOKEN_ID, wrong],
        pad_token_id=0,
    )
    edit_json(copy / "generation_config.json", eos_token_id=[EOS_TOKEN_ID, wrong])
    stopping = StoppingParams(max_new_tokens=8, min_new_tokens=8)
    async with running_engine(load_tiny(copy)) as engine:
        answer = await collect(engine, make_request(prompt, stopping=stopping))
    assert answer.token_ids == whole[0, len(prompt) :].tolist()


def test_a_negative_eos_does_not_forbid_the_last_token(directory: Path, tmp_path: Path) -> None:
    ids, _ = eos_with(directory, tmp_path, "generation_config.json", -1)
    last = SamplingParams(logit_bias={V - 1: 10_000.0})
    stopping = StoppingParams(max_new_tokens=2, min_new_tokens=2)
    check_generation(make_request([5], sampling=last, stopping=stopping), V, ids)
    assert V - 1 not in ids


def with_id(field: str, token_id: int) -> Request | ScoreRequest:
    if field == "prompt":
        return make_request([5, token_id, 6])
    if field == "sampling.logit_bias":
        return make_request([5], sampling=SamplingParams(logit_bias={3: 1.0, token_id: 1.0}))
    if field == "stopping.stop_token_ids":
        return make_request([5], stopping=StoppingParams(stop_token_ids=(4, token_id)))
    if field == "score prompt":
        return ScoreRequest(id="s", prompt_token_ids=(token_id, 5), continuations=((7,),))
    return ScoreRequest(id="s", prompt_token_ids=(5,), continuations=((7, 8), (9, token_id)))


def check_ids(request: Request | ScoreRequest) -> None:
    if isinstance(request, Request):
        check_generation(request, V, frozenset({EOS_TOKEN_ID}))
    else:
        check_scoring(request, V, max_tokens=1 << 20)


@pytest.mark.parametrize("token_id", [*NO_TOKENS, *NEGATIVE])
@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("prompt", "prompt"),
        ("sampling.logit_bias", "sampling.logit_bias"),
        ("stopping.stop_token_ids", "stopping.stop_token_ids"),
        ("score prompt", "prompt"),
        ("continuations", "continuations[1]"),
    ],
)
def test_a_callers_id_that_is_no_token_is_refused_by_field_and_limit(
    field: str, name: str, token_id: int
) -> None:
    request = with_id(field, token_id)
    with pytest.raises(FieldInvalidError) as caught:
        check_ids(request)
    assert caught.value.field == name
    assert str(token_id) in str(caught.value)
    assert str(V) in str(caught.value)


ALL_FORBIDDEN = {
    "one EOS and the other tokens": (5, frozenset({2}), (0, 1, 3, 4), False),
    "several EOS": (5, frozenset({0, 1, 2}), (3, 4), False),
    "stop tokens alone": (5, frozenset({2}), (0, 1, 2, 3, 4), False),
    "stop tokens twice": (5, frozenset({2}), (0, 1, 2, 3, 4, 4, 3), False),
    "EOS ignored, all of them stop tokens": (5, frozenset({2}), (0, 1, 2, 3, 4), True),
    "every token an EOS": (5, frozenset(range(5)), (), False),
    "a vocabulary of one token": (1, frozenset({0}), (), False),
    **{f"{v} tokens": (v, frozenset({v - 1}), tuple(range(v - 1)), False) for v in range(2, 258, 20)},
}
ONE_LEFT = {
    "EOS ignored": (5, frozenset({2}), (0, 1, 3, 4), True),
    "one not named": (5, frozenset({2}), (0, 1, 3), False),
    "one named twice": (5, frozenset({2}), (0, 1, 1, 2, 3), False),
    **{f"{v} tokens": (v, frozenset({v - 1}), tuple(range(v - 2)), False) for v in range(2, 258, 20)},
}


def check(case: tuple[int, frozenset[int], tuple[int, ...], bool], min_new_tokens: int) -> None:
    vocab_size, eos, stop, ignore_eos = case
    stopping = StoppingParams(stop_token_ids=stop, min_new_tokens=min_new_tokens, ignore_eos=ignore_eos)
    check_generation(make_request([0], stopping=stopping), vocab_size, eos)


@pytest.mark.parametrize("case", ALL_FORBIDDEN.values(), ids=ALL_FORBIDDEN)
def test_a_request_that_forbids_every_token_is_refused(
    case: tuple[int, frozenset[int], tuple[int, ...], bool],
) -> None:
    check(case, min_new_tokens=0)
    for min_new_tokens in (1, 7):
        with pytest.raises(FieldInvalidError, match=f"all {case[0]} tokens") as caught:
            check(case, min_new_tokens)
        assert caught.value.field == "stopping.min_new_tokens"


@pytest.mark.parametrize("case", ONE_LEFT.values(), ids=ONE_LEFT)
def test_a_request_that_leaves_one_token_is_taken(
    case: tuple[int, frozenset[int], tuple[int, ...], bool],
) -> None:
    check(case, min_new_tokens=3)


async def refused_by(engine: Engine, request: Request | ScoreRequest) -> bool:
    try:
        if isinstance(request, Request):
            await collect(engine, request)
        else:
            await engine.score(request)
    except FieldInvalidError:
        return True
    return False


async def test_the_engine_refuses_such_requests_before_anything_runs(model: LoadedModel) -> None:
    async with running_engine(model) as engine:
        for field in (
            "prompt",
            "sampling.logit_bias",
            "stopping.stop_token_ids",
            "score prompt",
            "continuations",
        ):
            assert await refused_by(engine, with_id(field, V))
        assert len((await collect(engine, make_request([5]))).tokens) == 8
        assert engine.is_alive
