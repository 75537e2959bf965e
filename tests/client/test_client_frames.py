"""Data frames in and out, of pandas and Polars, through both clients."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import pandas
import polars
import pytest

from manyhats.client import AsyncClient, Client, InvalidRequestError
from support.fakes.client import TEXT, FakeServer, make_status

QUESTIONS = ["How many?", "Who?", "When?"]


@pytest.fixture(params=[pandas, polars], ids=["pandas", "polars"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def frame(library: Any) -> Any:
    return library.DataFrame({"question": QUESTIONS, "task": ["sql", "", "tldr@1"]})


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, fake: FakeServer) -> Any:
    """A method of either client."""

    def of_sync(name: str, *args: Any, **options: Any) -> Any:
        with Client(fake.target) as client:
            return getattr(client, name)(*args, **options)

    def of_async(name: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(fake.target) as client:
                return await getattr(client, name)(*args, **options)

        return asyncio.run(run())

    return of_sync if request.param == "sync" else of_async


def values(frame: Any, name: str) -> list[Any]:
    """A column, with None for what is missing."""
    return [None if each is pandas.NA or each != each else each for each in frame[name].to_list()]


def test_generate_frame(fake: FakeServer, call: Any, frame: Any) -> None:
    fake.echoes = True
    found = call("generate_frame", frame, prompt="question", task_id="sql", max_new_tokens=9)
    assert list(found.columns) == [*frame.columns, "answer", "finish_reason", "generated_tokens", "version"]
    assert [text.rpartition(" ")[0] for text in values(found, "answer")] == QUESTIONS
    assert values(found, "finish_reason") == ["eos"] * 3
    assert values(found, "generated_tokens") == [4] * 3
    assert values(found, "version") == [2] * 3
    assert list(frame.columns) == ["question", "task"]
    assert {(request.task_id, request.stopping.max_new_tokens) for request in fake.requests} == {("sql", 9)}


def test_a_column_says_each_row_s_task(fake: FakeServer, call: Any, frame: Any) -> None:
    found = call("generate_frame", frame, prompt="question", task_id=frame["task"], into="question")
    assert {request.text: request.task_id for request in fake.requests} == dict(
        zip(QUESTIONS, ["sql", "", "tldr@1"], strict=True)
    )
    assert values(found, "question") == [TEXT] * 3
    assert values(found, "version") == [2, None, 2]


def test_prompts_may_be_conversations(fake: FakeServer, call: Any, library: Any) -> None:
    frame = library.DataFrame({"chat": [[{"role": "user", "content": text}] for text in QUESTIONS]})
    call("generate_frame", frame, prompt="chat")
    assert sorted(request.chat.messages[0].content for request in fake.requests) == sorted(QUESTIONS)


def test_errors_have_a_column_if_they_do_not_end_the_call(fake: FakeServer, call: Any, library: Any) -> None:
    frame = library.DataFrame({"question": ["a", None, "b"]})
    with pytest.raises(InvalidRequestError, match="must be text") as caught:
        call("generate_frame", frame, prompt="question")
    assert caught.value.__notes__ == ["rows[1]"]
    found = call("generate_frame", frame, prompt="question", on_error="return")
    assert values(found, "answer") == [TEXT, None, TEXT]
    assert values(found, "generated_tokens") == [4, None, 4]
    errors = values(found, "error")
    assert (errors[0], errors[2]) == (None, None)
    assert "must be text" in errors[1]


def test_rows_keep_their_index(fake: FakeServer, call: Any) -> None:
    fake.echoes = True
    frame = pandas.DataFrame({"question": QUESTIONS}, index=[7, 7, 3])
    found = call("generate_frame", frame, prompt="question")
    assert list(found.index) == [7, 7, 3]
    assert [text.rpartition(" ")[0] for text in found["answer"]] == QUESTIONS


def test_score_frame(fake: FakeServer, call: Any, frame: Any) -> None:
    found = call("score_frame", frame, prompt="question", labels=[" good", " bad"], task_id="sql")
    assert list(found.columns) == [*frame.columns, "label", "probability", "good", "bad"]
    good = 1 / (1 + math.exp(-1))  # the fake's log-probabilities are one apart
    assert values(found, "label") == ["good"] * 3
    assert values(found, "probability") == values(found, "good") == pytest.approx([good] * 3)
    assert values(found, "bad") == pytest.approx([1 - good] * 3)
    assert [each.text for each in fake.last_request.continuations] == [" good", " bad"]


@pytest.mark.parametrize("labels", ["good", ["good"], ["good", " good"], ["label", "bad"]])
def test_labels_that_make_no_columns_are_refused(
    fake: FakeServer, call: Any, frame: Any, labels: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="labels"):
        call("score_frame", frame, prompt="question", labels=labels)
    assert fake.requests == []


def test_classify_frame(fake: FakeServer, call: Any, frame: Any) -> None:
    found = call("classify_frame", frame, text="question", task_id="mood")
    assert list(found.columns) == [*frame.columns, "label", "score", "good", "bad"]
    assert values(found, "label") == ["good"] * 3
    assert values(found, "score") == values(found, "good") == [0.75] * 3
    assert values(found, "bad") == [0.25] * 3
    assert (
        values(call("classify_frame", frame, text="question", task_id="mood", top_k=1), "good") == [0.75] * 3
    )


def test_embed_frame(fake: FakeServer, call: Any, frame: Any) -> None:
    found = call("embed_frame", frame, text="question", into="vector")
    assert [list(vector) for vector in values(found, "vector")] == [[0.0, 0.5]] * 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("generate_frame", {"prompt": "question"}),
        ("score_frame", {"prompt": "question", "labels": ["a", "b"]}),
        ("classify_frame", {"text": "question", "task_id": "mood"}),
        ("embed_frame", {"text": "question"}),
    ],
)
def test_every_call_keeps_rows_that_fail(
    fake: FakeServer, call: Any, frame: Any, name: str, options: dict[str, Any]
) -> None:
    fake.status = make_status(grpc.StatusCode.NOT_FOUND, "no such task", reason="TASK_NOT_FOUND")
    found = call(name, frame, on_error="return", **options)
    assert values(found, "error") == ["no such task"] * 3
    new = set(found.columns) - {"question", "task", "error"}
    assert all(values(found, column) == [None] * 3 for column in new)


def test_a_frame_without_rows(fake: FakeServer, call: Any, frame: Any) -> None:
    found = call("generate_frame", frame.head(0), prompt="question")
    assert (len(found), "answer" in found.columns) == (0, True)


def test_what_is_no_frame_and_what_has_no_such_column_is_refused(call: Any, frame: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match="prompt: the frame must have one column 'text'; it has question"
    ):
        call("generate_frame", frame, prompt="text")
    twice = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(InvalidRequestError, match="one column 'text'"):
        call("embed_frame", twice, text="text")
    with pytest.raises(InvalidRequestError, match="must be a DataFrame of pandas or Polars, not dict"):
        call("generate_frame", {"question": QUESTIONS}, prompt="question")
