"""The client's calls that read texts, over a real port, and what their arguments become."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest

from manyhats.client import (
    AdapterRef,
    AsyncClient,
    ChatMessage,
    Classification,
    ClassScore,
    Client,
    Entity,
    InvalidRequestError,
    RankedText,
    TaggedText,
    TaskKindError,
    TokenClass,
    Usage,
    encoding_convert,
)
from manyhats.v1 import adapter_pb2, encoding_pb2
from support.fakes.client import FakeServer, make_status

USAGE = Usage(
    prompt_tokens=7, cached_prompt_tokens=3, generated_tokens=0, queue_ms=1.5, prefill_ms=2.5, decode_ms=3.5
)
GOOD, BAD = ClassScore("good", 0, 0.75, 1.5), ClassScore("bad", 1, 0.25, 0.5)


def test_embed(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        result = client.embed(["a", "b"], task_id="docs", pooling="mean", dimensions=2, request_id="r-1")
    assert result.values == [[0.0, 0.5], [1.0, 0.5]]
    assert (result.vectors.dtype, result.vectors.tolist()) == (np.float32, result.values)
    assert (result.num_tokens, result.usage, result.base_digest) == ((3, 3), USAGE, "sha256:ba5e")
    assert (result.adapter, result.request_id) == (AdapterRef("docs", 2, "sha256:ab"), "r-1")
    assert fake.last_request.pooling == adapter_pb2.POOLING_MEAN


def test_classify_by_one_task_and_by_several(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        result = client.classify(["a"], task_id="mood")
        several = client.classify(["a", "b"], task_id=["mood", "topic@2"], top_k=1)
    assert result.results == (Classification((GOOD, BAD), 3, AdapterRef("mood", 2, "sha256:ab")),)
    assert (result.results[0].label, result.results[0].score) == ("good", 0.75)
    assert (result.usage, result.request_id) == (USAGE, "made-by-server")
    tasks = [each.adapter.task_id for each in several.results if each.adapter is not None]
    assert tasks == ["mood", "topic@2"] * 2
    assert [each.classes for each in several.results] == [(GOOD,)] * 4


def test_tag_finds_entities_unless_tokens_are_wanted(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        result = client.tag(["John lives."], task_id="ner")
        client.tag(["a"], task_id="ner", aggregation="max")
        assert fake.last_request.aggregation == encoding_pb2.AGGREGATION_MAX
        tokens = [client.tag(["a"], task_id="ner", aggregation=each) for each in (None, "none")]
    assert result.results == (TaggedText((Entity("PER", 0, 4, "John", 0.75),), (), 3),)
    assert result.adapter == AdapterRef("ner", 2, "sha256:ab")
    classes = (ClassScore("B-PER", 0, 0.75, 1.5), ClassScore("O", 1, 0.25, 0.5))
    assert [each.results for each in tokens] == [(TaggedText((), (TokenClass(1, 0, 4, classes),), 3),)] * 2


def test_rerank(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        result = client.rerank("q", ["a", "b", "c"], task_id="docs", top_n=2, return_texts=True)
    assert result.results == (RankedText(2, 0.5, "c"), RankedText(1, 0.25, "b"))
    assert (result.usage, result.request_id) == (USAGE, "made-by-server")


async def test_every_call_of_the_async_client(fake: FakeServer) -> None:
    async with AsyncClient(fake.target) as client:
        assert (await client.embed(["a"])).values == [[0.0, 0.5]]
        assert (await client.embed(["a"])).adapter is None
        assert (await client.classify(["a"], task_id="mood")).results[0].label == "good"
        assert (await client.tag(["John"], task_id="ner")).results[0].entities[0].text == "John"
        assert (await client.rerank("q", ["a"], task_id="docs")).results == (RankedText(0, 0.0),)


def test_a_task_of_another_kind_is_an_error_of_its_own(fake: FakeServer) -> None:
    fake.status = make_status(
        grpc.StatusCode.FAILED_PRECONDITION,
        "sql@2 does not classify texts: its kind is generate",
        reason="TASK_KIND_MISMATCH",
        metadata={"kind": "generate"},
    )
    with Client(fake.target) as client, pytest.raises(TaskKindError, match="does not classify") as caught:
        client.classify(["a"], task_id="sql")
    assert caught.value.metadata == {"kind": "generate"}


def test_adapters_and_server_say_what_they_read(fake: FakeServer) -> None:
    with Client(fake.target) as client:
        adapter, info = client.get_adapter("sql"), client.server_info()
        fake.is_old = True
        old = client.server_info()
    assert (adapter.kind, adapter.class_labels, adapter.pooling) == ("classify", ("good", "bad"), "last")
    assert (info.attention, info.embedding_size, info.default_pooling) == ("causal", 576, "last")
    assert info.services == ("manyhats.v1.EncodingService",)
    assert (old.attention, old.embedding_size, old.default_pooling, old.services) == ("", 0, "", ())


def test_texts_are_of_every_kind() -> None:
    texts: list[Any] = ["a", ("b", "c"), [1, 2], (3, 4), [ChatMessage("user", "d")]]
    inputs = encoding_convert.embed_request(texts, "", {}).inputs
    assert [each.WhichOneof("content") for each in inputs] == [
        "text",
        "text",
        "token_ids",
        "token_ids",
        "chat",
    ]
    assert [each.text_pair for each in inputs] == ["", "c", "", "", ""]
    assert [list(each.token_ids.ids) for each in inputs[2:4]] == [[1, 2], [3, 4]]


def test_options_that_are_none_are_not_sent() -> None:
    options = dict.fromkeys(("pooling", "normalize", "dimensions", "add_special_tokens", "priority"))
    request = encoding_convert.embed_request(["a"], "", options)
    assert [field.name for field, _ in request.ListFields()] == ["inputs"]
    assert encoding_convert.embed_request(["a"], "", {"normalize": False}).HasField("normalize")


def test_every_call_may_cut_long_texts() -> None:
    options = {"truncation": "end"}
    for request in (
        encoding_convert.embed_request(["a"], "", options),
        encoding_convert.classify_request(["a"], "mood", options),
        encoding_convert.tag_request(["a"], "ner", options),
        encoding_convert.rerank_request("q", ["a"], "docs", options),
    ):
        assert request.truncation == encoding_pb2.TRUNCATION_END


@pytest.mark.parametrize(
    ("texts", "options", "field"),
    [
        (["a", 7], {}, "inputs[1]"),
        (["a", ["b"]], {}, "inputs[1].token_ids"),
        ([("a", 3)], {}, "inputs[0].text_pair"),
        ([[{"role": "user"}]], {}, "inputs[0].chat.messages[0].content"),
        (["a"], {"pooling": "sum"}, "pooling"),
        (["a"], {"pooling": 3}, "pooling"),
        (["a"], {"dimensions": -1}, "dimensions"),
        (["a"], {"truncation": "start"}, "truncation"),
    ],
)
def test_what_does_not_fit_names_its_field(texts: Any, options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encoding_convert.embed_request(texts, "", options)
    assert caught.value.field == field


def test_an_unknown_aggregation_names_those_that_are() -> None:
    with pytest.raises(InvalidRequestError, match="none, simple, first, max, not 'average'"):
        encoding_convert.tag_request(["a"], "ner", {"aggregation": "average"})


def test_one_text_instead_of_several_and_unknown_options_are_refused() -> None:
    for call in (
        lambda: encoding_convert.embed_request("abc", "", {}),
        lambda: encoding_convert.rerank_request("q", "abc", "docs", {}),
    ):
        with pytest.raises(TypeError, match="must be several"):
            call()
    for make, name in ((encoding_convert.embed_request, "embed"), (encoding_convert.tag_request, "tag")):
        with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'temperature'"):
            make(["a"], "", {"temperature": 1.0})


def test_the_client_imports_no_numpy() -> None:
    program = "import manyhats.client, sys; raise SystemExit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
