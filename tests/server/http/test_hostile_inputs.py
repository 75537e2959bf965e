"""Bodies of routes that read texts which no honest client sends: each is refused by its field, and nothing is read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from manyhats.adapters.heads import TaskKind
from manyhats.server.http.body import MAX_BODY_BYTES
from support.fakes.server import Running, make_record, running_server
from support.harnesses.http import exchange, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEEP = 100_000
MANY = ["a"] * 1025
# Route → a good body.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a"},
    "/embed": {"inputs": "a"},
    "/v1/classify": {"model": "mood", "input": "a"},
    "/predict": {"model": "mood", "inputs": "a"},
    "/v1/rerank": {"model": "relevance", "query": "a", "documents": ["b"]},
    "/rerank": {"model": "relevance", "query": "a", "texts": ["b"]},
}
WRONG_KINDS: tuple[Any, ...] = (1, 1.5, True, {}, None)
# Route → field → values of a range or kind that it does not have.
BAD: dict[str, dict[str, tuple[Any, ...]]] = {
    "/v1/embeddings": {
        "input": (
            *WRONG_KINDS,
            "",
            [],
            [""],
            ["a", ""],
            [[]],
            ["a", []],
            ["a", 1],
            [1.5],
            [[1.5]],
            [[["a"]]],
            *([None], [True], MANY, [[1]] * 1025, ["a"] * 130_000, "é" * 600_000, [-1], [10**9], [10**40]),
        ),
        "encoding_format": ("int8", "", 1, [], "Float"),
        "dimensions": (0, -1, 9, 1.5, "8", True, 10**30),
        "model": (1, [], {}),
        "priority": (2**31 + 1, "high"),
        "cache_salt": ("x" * 257, 1),
        "request_id": ("x" * 129, "a\nb"),
        "inputs": ("a",),
        "truncate_prompt_tokens": (5,),
        "": (1,),
    },
    "/embed": {
        "inputs": (*WRONG_KINDS, "", [], [""], [[]], ["a", 1], [[["a"]]], MANY, [-1]),
        "normalize": ("yes", 1),
        "dimensions": (0, -1, 9, "8"),
        "prompt_name": ("query",),
        "truncate": ("yes", 1),
        "truncation_direction": ("Left", "", 1),
        "input": ("a",),
    },
    "/v1/classify": {
        "input": (*WRONG_KINDS, "", [], [""], ["a", 1], [["a"]], [1, 2], MANY, ["a"] * 130_000),
        "probs": (True,),
    },
    "/predict": {
        "inputs": (
            *WRONG_KINDS,
            "",
            [],
            [""],
            ["", "a"],
            ["a", ""],
            ["a", "b", "c"],
            [[]],
            [["a", "b", "c"]],
            *([["a"], 1], [[["a"]]], [[""]], [["a"]] * 1025, [["a"]] * 30_000),
        ),
        "raw_scores": ("no", 1),
    },
    "/v1/rerank": {
        "query": (*WRONG_KINDS, "", "é" * 600_000),
        "documents": (
            *WRONG_KINDS,
            [],
            [""],
            ["a", ""],
            [1],
            [{}],
            [{"text": 1}],
            [{"text": "a", "x": 1}],
            *("a", MANY, ["a"] * 130_000),
        ),
        "top_n": (0, -1, 1.5, "1"),
        "return_documents": ("yes",),
        "raw_scores": (True,),
        "return_text": (False,),
        "truncate": (True,),
        "rank_fields": (["text"],),
    },
    "/rerank": {
        "texts": (*WRONG_KINDS[:-1], [], [""], ["a", ""], [1], [{"text": "a"}], "a", MANY),
        "raw_scores": ("no",),
        "top_n": (1,),
        "return_documents": (True,),
    },
}


def refused() -> Iterator[tuple[str, str, Any, str]]:
    for path, fields in BAD.items():
        for field, values in fields.items():
            for value in values:
                yield f"{path} {field} {str(value)[:40]}", path, {**GOOD[path], field: value}, field
        required = next(name for name in ("inputs", "input", "query") if name in GOOD[path])
        rest = {name: value for name, value in GOOD[path].items() if name != required}
        yield f"{path} without", path, rest, required
        yield f"{path} a list", path, [GOOD[path]], "body"
        yield f"{path} deep", path, "[" * DEEP + "]" * DEEP, "body"
        yield f"{path} half", path, json.dumps(GOOD[path])[:-1], "body"
        yield f"{path} deep input", path, f'{{"{required}":{"[" * DEEP}{"]" * DEEP}}}', ""
    for path in ("/v1/rerank", "/rerank"):
        yield f"{path} both", path, {"query": "a", "documents": ["b"], "texts": ["b"]}, "documents"
        yield f"{path} neither", path, {"query": "a"}, "documents"


REFUSED = list(refused())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Running]:
    async with running_server() as running:
        moods = {"class.0": "good", "class.1": "bad"}
        running.store.tasks["mood"] = [make_record("mood", labels=moods, kind=TaskKind.CLASSIFY)]
        running.store.tasks["relevance"] = [make_record("relevance", kind=TaskKind.CLASSIFY)]
        yield running


@pytest.mark.parametrize(("name", "path", "body", "param"), REFUSED, ids=[each[0] for each in REFUSED])
async def test_a_bad_body_is_refused_by_its_field(
    server: Running, name: str, path: str, body: Any, param: str
) -> None:
    server.engine.encode_requests.clear()
    reply = await exchange(server.http, request(path, body), timeout_s=60)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error"), reply
    assert reply.error["param"].startswith(param)
    assert len(reply.body) < 10_000
    assert not server.engine.encode_requests


@pytest.mark.parametrize("path", GOOD)
async def test_good_bodies_are_answered_and_too_large_ones_are_not(server: Running, path: str) -> None:
    assert (await exchange(server.http, request(path, GOOD[path]))).status == 200
    assert (await exchange(server.http, request(path, " " * (MAX_BODY_BYTES + 1)))).status == 413
    as_text = request(path, GOOD[path], "content-type: text/plain")
    assert (await exchange(server.http, as_text)).status == 415
    assert (await exchange(server.http, request(path, "", method="GET"))).status == 405


@pytest.mark.parametrize("path", ["/embed", "/predict", "/v1/rerank", "/rerank"])
async def test_the_header_names_one_task_and_the_one_of_the_body(server: Running, path: str) -> None:
    task = GOOD[path].get("model", "sql")
    server.store.tasks["sql"] = [make_record("sql")]
    body = {**GOOD[path], "model": None}
    for name in (task, f"{task}@1", f"echo:{task}"):
        assert (await exchange(server.http, request(path, body, f"x-task-id: {name}"))).status == 200
    for model in (task, "echo", ""):
        named = {**body, "model": model}
        assert (await exchange(server.http, request(path, named, f"X-Task-Id: {task}"))).status == 200
    other = {**body, "model": "other"}
    for given in (
        request(path, other, f"x-task-id: {task}"),
        request(path, body, f"x-task-id: {task}", "x-task-id: other"),
    ):
        reply = await exchange(server.http, given)
        assert (reply.status, reply.error["param"]) == (400, "model")
    for strange in ("no", "\xff\xfe", "a" * 300, "../../etc", "a@b", "@", "echo:echo:a"):
        reply = await exchange(server.http, request(path, body, f"x-task-id: {strange}"))
        assert reply.status in (400, 404), (strange, reply)
        assert reply.error["param"] == "model"
