"""Scores and classes over HTTP: gRPC's numbers, exactly."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from manyhats.engine.output import Usage
from manyhats.server.service.call import Call
from manyhats.server.service.classification import Classified
from manyhats.server.service.generations import Generations
from manyhats.v1 import generation_pb2 as pb
from support.factories.tiny_models import make_checkpoint
from support.fakes.server import Running, make_record, running_server
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import Served, served_engine
from support.harnesses.http import Reply, exchange, request

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCORE = "/v1/score"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = make_checkpoint(tmp_path_factory.mktemp("scores") / "model", seed=13)
    async with served_engine(load_tiny(directory)) as served:
        yield served


async def post(server: Served | Running, path: str, body: Any) -> Reply:
    return await exchange(server.http, request(path, body), timeout_s=60)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"text": "Once upon"}, {"prompt": "Once upon"}),
        (
            {"text": "Once upon", "add_special_tokens": False},
            {"prompt": "Once upon", "add_special_tokens": False},
        ),
        ({"token_ids": {"ids": [7, 8, 9]}}, {"prompt": [7, 8, 9]}),
    ],
)
async def test_scores_are_those_of_grpc(real: Served, ours: Any, theirs: Any) -> None:
    continuations = [pb.Continuation(text=" a time"), pb.Continuation(token_ids=pb.TokenIds(ids=[5, 6]))]
    given = await real.generation.Score(pb.ScoreRequest(continuations=continuations, **ours))
    reply = await post(real, SCORE, {**theirs, "continuations": [" a time", [5, 6]], "logprobs": True})
    scores = reply.json["scores"]
    assert [score["logprob"] for score in scores] == [score.logprob for score in given.scores]
    assert [score["num_tokens"] for score in scores] == [score.num_tokens for score in given.scores]
    tokens = [[token["logprob"] for token in score["tokens"]] for score in scores]
    assert tokens == [
        [pytest.approx(token.logprob, abs=1e-6) for token in score.tokens] for score in given.scores
    ]
    assert reply.json["usage"]["prompt_tokens"] == given.usage.prompt_tokens


async def test_echoed_log_probabilities_sum_to_the_score(real: Served) -> None:
    prompt, continuation = [7, 8, 9], [5, 6]
    scored = await post(real, SCORE, {"prompt": prompt, "continuations": [continuation]})
    echoed = await post(
        real,
        "/v1/completions",
        {"prompt": prompt + continuation, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0},
    )
    logprobs = echoed.json["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == 6
    assert sum(logprobs["token_logprobs"][3:-1]) == pytest.approx(
        scored.json["scores"][0]["logprob"], abs=1e-5
    )
    greedy = [
        max(top.values()) == own
        for top, own in zip(logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True)
    ]
    assert greedy[-1]
    only_scored = await post(
        real,
        "/v1/completions",
        {"prompt": prompt + continuation, "echo": True, "max_tokens": 0, "logprobs": 1},
    )
    (choice,) = only_scored.json["choices"]
    assert choice["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    assert (only_scored.json["usage"]["completion_tokens"], choice["finish_reason"]) == (0, "length")


async def test_items_are_scored_by_their_labels(real: Served) -> None:
    body: dict[str, Any] = {"query": "Once upon", "items": [" a time", " the"], "label_token_ids": [5, 6, 7]}
    plain = (await post(real, SCORE, body)).json["scores"]
    shares = (await post(real, SCORE, {**body, "apply_softmax": True})).json["scores"]
    for item, row, share in zip(body["items"], plain, shares, strict=True):
        given = await real.generation.Score(
            pb.ScoreRequest(
                text=body["query"] + item,
                continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=[each])) for each in (5, 6, 7)],
            )
        )
        wanted = [math.exp(score.logprob) for score in given.scores]
        assert row == pytest.approx(wanted)
        assert share == pytest.approx([each / sum(wanted) for each in wanted])
    turned = (await post(real, SCORE, {**body, "query": "b", "items": "a", "item_first": True})).json[
        "scores"
    ]
    straight = (await post(real, SCORE, {**body, "query": "a", "items": ["b"]})).json["scores"]
    assert turned == straight
    ids = (await post(real, SCORE, {"query": [7, 8], "items": [[9], [10]], "label_token_ids": [5]})).json[
        "scores"
    ]
    one = (await post(real, SCORE, {"query": [7, 8], "items": [9], "label_token_ids": [5]})).json["scores"]
    assert ids[:1] == one


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a"}, "continuations"),
        ({"prompt": "a", "continuations": []}, "continuations"),
        ({"prompt": "a", "continuations": [""]}, "continuations[0]"),
        ({"prompt": "a", "continuations": [[-1]]}, "continuations[0]"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "continuations": ["a"]}, "prompt"),
        ({"query": "a", "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": ["b"]}, "label_token_ids"),
        ({"query": "a", "items": [], "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": ["a"] * 257, "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": [[1]], "label_token_ids": [1]}, "items[0]"),
        ({"query": "a", "items": ["b"], "label_token_ids": [10**9]}, "label_token_ids"),
        ({"query": "a", "items": ["b"], "label_token_ids": [1], "prompt": "a"}, "items"),
    ],
)
async def test_faults_name_their_field(real: Served, body: Any, param: str) -> None:
    reply = await post(real, SCORE, body)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert reply.error["param"].startswith(param)


async def test_classes_have_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    async def classify(self: Generations, call: Call, texts: list[str]) -> list[Classified]:
        assert call.name == "mood"
        shares = [(0.25, 0.75), (0.5, 0.5)][: len(texts)]
        return [Classified(("good", "bad"), each, each.index(max(each)), Usage(3, 1)) for each in shares]

    monkeypatch.setattr(Generations, "classify", classify)
    async with running_server() as server:
        server.store.tasks["mood"] = [make_record("mood")]
        for path in ("/v1/classify", "/classify"):
            reply = await post(server, path, {"model": "mood", "input": ["awful", "so so"]})
            assert reply.json["data"] == [
                {"index": 0, "label": "bad", "probs": [0.25, 0.75], "num_classes": 2},
                {"index": 1, "label": "good", "probs": [0.5, 0.5], "num_classes": 2},
            ]
            assert (reply.json["model"], reply.json["usage"]["prompt_tokens"]) == ("mood", 6)
        one = await post(server, "/v1/classify", {"model": "mood", "input": "awful"})
        assert one.json["data"] == reply.json["data"][:1]


async def test_what_cannot_be_classified_is_refused_by_its_field() -> None:
    async with running_server() as server:
        labels = {"class.0": "good", "class.1": "bad", "classify.prompt": "text"}
        server.store.tasks["mood"] = [make_record("mood", labels=labels)]
        server.store.tasks["plain"] = [make_record("plain")]
        for model in ("plain", ""):
            reply = await post(server, "/v1/classify", {"model": model, "input": "a"})
            assert (reply.status, reply.error["param"]) == (400, "model")
        for texts, param in (([], "input"), ([""], "input[0]"), (["a", "b" * 2**21], "input")):
            reply = await post(server, "/v1/classify", {"model": "mood", "input": texts})
            assert (reply.status, reply.error["param"]) == (400, param)
