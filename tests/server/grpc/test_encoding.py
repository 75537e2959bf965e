"""EncodingService over a real port: fields, what is refused, and by which name."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.errors import NumericalError, PromptTooLongError
from manyhats.server.grpc.port import SERVICES
from manyhats.v1 import adapter_pb2 as apb
from manyhats.v1 import encoding_pb2 as pb
from manyhats.v1 import generation_pb2 as gpb
from manyhats.v1 import server_pb2 as spb
from support.fakes.server import BOS, INFO, Running, byte_ids, refused, running_server

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
FACTS: dict[str, dict[str, Any]] = {
    "mood": {"kind": TaskKind.CLASSIFY, "num_classes": 3, "pooling": Pooling.LAST},
    "tags": {"kind": TaskKind.CLASSIFY_TOKENS, "num_classes": 3, "pooling": Pooling.ALL},
    "rank": {"kind": TaskKind.CLASSIFY, "num_classes": 1, "pooling": Pooling.LAST},
    "docs": {"kind": TaskKind.EMBED, "pooling": Pooling.MEAN},
    "says": {},
}
LABELS = {
    "mood": {"class.0": "good", "class.1": "bad", "class.2": "so-so"},
    "tags": {"class.0": "O", "class.1": "B-PER", "class.2": "I-PER"},
}


def prepared(server: Running) -> Running:
    """A task of each kind, named as it is here."""
    server.store.facts |= FACTS
    for task in FACTS:
        server.store.register(Registration(task, Uri(task), labels=LABELS.get(task, {})))
    return server


def texts(*given: str) -> list[pb.TextInput]:
    return [pb.TextInput(text=each) for each in given]


async def test_every_field_of_embed_reaches_the_engine() -> None:
    async with running_server() as server:
        prepared(server)
        chat = gpb.ChatMessages(messages=[gpb.ChatMessage(role="user", content="hi")])
        await server.encoding.Embed(
            pb.EmbedRequest(
                request_id="mine",
                task_id="docs",
                inputs=[
                    pb.TextInput(text="ab"),
                    pb.TextInput(text="a", text_pair="b"),
                    pb.TextInput(token_ids=gpb.TokenIds(ids=[7, 8])),
                    pb.TextInput(chat=chat),
                ],
                pooling=apb.POOLING_MEAN,
                add_special_tokens=False,
                cache_salt="salt",
                priority=3,
            )
        )
        await server.encoding.Embed(pb.EmbedRequest(inputs=texts("a")))
    first, second = server.engine.encode_requests
    chat_ids = (BOS, *byte_ids("user:hi;"))
    assert first.inputs == (byte_ids("ab"), byte_ids("a\tb"), (7, 8), chat_ids)
    assert (first.pooling, first.applies_head, first.adapter.name) == (Pooling.MEAN, False, "docs@1")
    assert (first.cache_salt, first.priority) == ("salt", 3)
    assert (second.inputs, second.pooling, second.adapter) == (((BOS, *byte_ids("a")),), None, None)
    assert (second.cache_salt, second.priority, second.deadline_s) == ("", 0, None)


async def test_embed_answers_with_vectors_usage_and_names() -> None:
    async with running_server() as server:
        prepared(server)
        request = pb.EmbedRequest(request_id="mine", task_id="docs", inputs=texts("a", "bcd"))
        answer = await server.encoding.Embed(request)
        request.normalize = False
        raw = await server.encoding.Embed(request)
        request.dimensions = 2
        cut = await server.encoding.Embed(request)
        request.normalize = True
        unit = await server.encoding.Embed(request)
    assert (answer.request_id, answer.base_digest) == ("mine", "sha256:base")
    assert (answer.adapter.task_id, answer.adapter.version) == ("docs", 1)
    assert (answer.usage.prompt_tokens, answer.usage.queue_ms, answer.usage.prefill_ms) == (6, 1.0, 2.0)
    assert [each.num_tokens for each in answer.embeddings] == [2, 4]
    shares = np.bincount(np.array([BOS, *byte_ids("bcd")]) % 8, minlength=8) / 4
    assert list(raw.embeddings[1].values) == shares.tolist()
    assert list(cut.embeddings[1].values) == shares[:2].tolist()
    for made, plain in ((answer, raw), (unit, cut)):
        length = math.hypot(*plain.embeddings[1].values)
        wanted = [value / length for value in plain.embeddings[1].values]
        assert list(made.embeddings[1].values) == pytest.approx(wanted)


async def test_base_and_generating_tasks_embed_too_and_classifiers_by_a_pooling() -> None:
    async with running_server() as server:
        prepared(server)
        for task in ("", "says", "docs"):
            await server.encoding.Embed(pb.EmbedRequest(task_id=task, inputs=texts("a")))
        for task in ("mood", "tags"):
            refusal = await refused(server.encoding.Embed(pb.EmbedRequest(task_id=task, inputs=texts("a"))))
            assert (refusal.code, refusal.reason) == (PRECONDITION, "TASK_KIND_MISMATCH")
            assert dict(refusal.info.metadata) == {"kind": FACTS[task]["kind"].value}
            request = pb.EmbedRequest(task_id=task, inputs=texts("a"), pooling=apb.POOLING_FIRST)
            await server.encoding.Embed(request)


async def test_classify_tells_the_classes_of_each_text_best_first() -> None:
    async with running_server() as server:
        prepared(server)
        request = pb.ClassifyRequest(request_id="mine", task_ids=["mood"], inputs=texts("a", "b"), priority=2)
        answer = await server.encoding.Classify(request)
        request.top_k = 1
        request.raw_scores = True
        raw = await server.encoding.Classify(request)
    assert server.engine.encode_requests[0].priority == 2
    assert (answer.request_id, answer.usage.prompt_tokens) == ("mine", 4)
    assert [each.num_tokens for each in answer.results] == [2, 2]
    assert [each.adapter.digest for each in answer.results] == ["sha256:mood"] * 2
    first = answer.results[0].classes
    assert [(each.label, each.index) for each in first] == [("so-so", 2), ("bad", 1), ("good", 0)]
    assert [each.logit for each in first] == pytest.approx([2.97, 1.98, 0.99])
    weights = [math.exp(each.logit) for each in first]
    assert [each.score for each in first] == pytest.approx([weight / sum(weights) for weight in weights])
    assert [len(each.classes) for each in raw.results] == [1, 1]
    assert raw.results[0].classes[0].score == raw.results[0].classes[0].logit == first[0].logit


async def test_classify_puts_each_text_to_each_task_at_once() -> None:
    async with running_server() as server:
        prepared(server)
        server.engine.step_s = 0.2
        request = pb.ClassifyRequest(task_ids=["mood", "rank@1", "mood"], inputs=texts("a", "b"))
        began_s = asyncio.get_running_loop().time()
        answer = await server.encoding.Classify(request)
        took_s = asyncio.get_running_loop().time() - began_s
    assert took_s < 0.5
    assert [each.adapter.task_id for each in answer.results] == ["mood", "rank", "mood"] * 2
    assert [len(each.classes) for each in answer.results] == [3, 1, 3] * 2
    assert answer.results[1].classes[0].label == "LABEL_0"
    assert (answer.usage.prompt_tokens, answer.usage.queue_ms) == (12, 1.0)
    assert len({each.id for each in server.engine.encode_requests}) == 3


@pytest.mark.parametrize(("activation", "wanted"), [("sigmoid", 0.72908), ("none", 0.99)])
async def test_classify_scores_as_the_task_says(activation: str, wanted: float) -> None:
    async with running_server() as server:
        prepared(server)
        labels = {**LABELS["mood"], "classify.activation": activation}
        server.store.register(Registration("own", Uri("mood"), labels=labels))
        request = pb.ClassifyRequest(task_ids=["own"], inputs=texts("a"))
        answer = await server.encoding.Classify(request)
    assert answer.results[0].classes[2].score == pytest.approx(wanted, abs=1e-5)


async def test_classify_tokens_leaves_out_special_ones() -> None:
    async with running_server() as server:
        prepared(server)
        request = pb.ClassifyTokensRequest(task_id="tags", inputs=texts("é b"), top_k=2)
        answer = await server.encoding.ClassifyTokens(request)
    (tagged,) = answer.results
    assert (tagged.num_tokens, list(tagged.entities), answer.adapter.task_id) == (5, [], "tags")
    assert [(each.token_index, each.start, each.end) for each in tagged.tokens] == [
        (1, 0, 1),
        (2, 0, 1),
        (3, 1, 2),
        (4, 2, 3),
    ]
    assert [[each.label for each in token.classes] for token in tagged.tokens] == [["I-PER", "B-PER"]] * 4
    assert tagged.tokens[3].classes[0].logit == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["SIMPLE", "FIRST", "MAX"])
async def test_classify_tokens_finds_entities(name: str) -> None:
    async with running_server() as server:
        prepared(server)
        aggregation = pb.Aggregation.Value(f"AGGREGATION_{name}")
        request = pb.ClassifyTokensRequest(task_id="tags", inputs=texts(" an bo "), aggregation=aggregation)
        answer = await server.encoding.ClassifyTokens(request)
    (tagged,) = answer.results
    assert (list(tagged.tokens), tagged.num_tokens) == ([], 8)
    (entity,) = tagged.entities
    assert (entity.label, entity.start, entity.end, entity.text) == ("PER", 1, 6, "an bo")
    assert 0.6 < entity.score < 0.7


async def test_rerank_sorts_texts() -> None:
    async with running_server() as server:
        prepared(server)
        request = pb.RerankRequest(request_id="mine", task_id="rank", query="q", texts=["b", "d", "a", "d"])
        answer = await server.encoding.Rerank(request)
        request.raw_scores = request.return_texts = True
        request.top_n = 2
        raw = await server.encoding.Rerank(request)
    assert server.engine.encode_requests[0].inputs[0] == (BOS, *byte_ids("q\tb"))
    assert (answer.request_id, answer.adapter.task_id, answer.usage.prompt_tokens) == ("mine", "rank", 16)
    assert [(each.index, each.text) for each in answer.results] == [(1, ""), (3, ""), (0, ""), (2, "")]
    assert answer.results[0].score == pytest.approx(1 / (1 + math.exp(-1.02)), abs=1e-6)
    assert [(each.index, each.text) for each in raw.results] == [(1, "d"), (3, "d")]
    assert raw.results[0].score == pytest.approx(1.02)


def embed(**fields: Any) -> tuple[str, Any]:
    return "Embed", pb.EmbedRequest(**{"inputs": texts("a"), **fields})


def classify(**fields: Any) -> tuple[str, Any]:
    return "Classify", pb.ClassifyRequest(**{"task_ids": ["mood"], "inputs": texts("a"), **fields})


def tag(**fields: Any) -> tuple[str, Any]:
    return "ClassifyTokens", pb.ClassifyTokensRequest(**{"task_id": "tags", "inputs": texts("a"), **fields})


def rerank(**fields: Any) -> tuple[str, Any]:
    return "Rerank", pb.RerankRequest(**{"task_id": "rank", "query": "q", "texts": ["a"], **fields})


MANY = texts("a") * 1025
CHAT = gpb.ChatMessages(messages=[gpb.ChatMessage(role="refused", content="a")])
IDS = gpb.TokenIds(ids=[5])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (embed(inputs=[]), "inputs"),
        (embed(inputs=MANY), "inputs"),
        (classify(inputs=[]), "inputs"),
        (classify(inputs=MANY), "inputs"),
        (tag(inputs=[]), "inputs"),
        (tag(inputs=MANY), "inputs"),
        (rerank(texts=[]), "texts"),
        (rerank(texts=["a"] * 1025), "texts"),
        (rerank(texts=["a", ""]), "texts[1]"),
        (rerank(query=""), "query"),
        (rerank(task_id="mood"), "task_id"),
        (classify(task_ids=["mood"] * 17), "task_ids"),
        (embed(inputs=[pb.TextInput()]), "inputs[0]"),
        (embed(inputs=texts("a", "")), "inputs[1].text"),
        (embed(inputs=[pb.TextInput(text="", text_pair="a")]), "inputs[0].text"),
        (embed(inputs=[pb.TextInput(token_ids=IDS, text_pair="a")]), "inputs[0].text_pair"),
        (embed(inputs=[pb.TextInput(token_ids=gpb.TokenIds())]), "inputs[0].token_ids.ids"),
        (embed(inputs=[pb.TextInput(token_ids=gpb.TokenIds(ids=[300]))]), "inputs[0].token_ids.ids"),
        (embed(inputs=[*texts("a"), pb.TextInput(chat=CHAT)]), "inputs[1].chat"),
        (embed(inputs=[pb.TextInput(chat=gpb.ChatMessages())]), "inputs[0].chat.messages"),
        (tag(inputs=[*texts("a"), pb.TextInput(token_ids=IDS)]), "inputs[1]"),
        (tag(inputs=[pb.TextInput(text="a", text_pair="b")]), "inputs[0]"),
        (tag(aggregation=9), "aggregation"),
        (embed(pooling=9), "pooling"),
        (embed(dimensions=9), "dimensions"),
        (embed(truncation=2), "truncation"),
        (classify(truncation=2), "truncation"),
        (tag(truncation=2), "truncation"),
        (rerank(truncation=2), "truncation"),
        (embed(cache_salt="x" * 257), "cache_salt"),
        (embed(request_id="\n"), "request_id"),
    ],
)
async def test_what_cannot_be_is_refused_by_its_field(call: tuple[str, Any], field: str) -> None:
    method, request = call
    async with running_server() as server:
        prepared(server)
        refusal = await refused(getattr(server.encoding, method)(request))
    assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "FIELD_INVALID", (field,))


@pytest.mark.parametrize("method", [embed, classify, tag])
async def test_a_text_that_is_too_long_is_named(method: Any) -> None:
    async with running_server() as server:
        prepared(server)
        name, request = method(inputs=texts("a", "x" * 1023, "x" * 1024))
        refusal = await refused(getattr(server.encoding, name)(request))
        assert (refusal.code, refusal.reason) == (INVALID, "PROMPT_TOO_LONG")
        assert dict(refusal.info.metadata) == {"field": "inputs[2]", "num_tokens": "1025", "limit": "1024"}
        name, request = rerank(texts=["a", "x" * 1022])
        refusal = await refused(getattr(server.encoding, name)(request))
        assert refusal.info.metadata["field"] == "texts[1]"
        # The engine knows how many virtual tokens the adapter has.
        server.engine.error = PromptTooLongError("inputs[1]", 1020, 1000)
        refusal = await refused(getattr(server.encoding, name)(rerank(texts=["a", "b"])[1]))
        assert refusal.info.metadata["field"] == "texts[1]"


async def test_a_text_that_is_too_long_is_cut_where_that_is_asked() -> None:
    long = "x" * 5000
    async with running_server() as server:
        prepared(server)
        calls = (
            embed(inputs=texts("a", long)),
            classify(inputs=texts("a", long)),
            tag(inputs=texts("a", long)),
            tag(inputs=texts("a", long), aggregation=pb.AGGREGATION_SIMPLE),
            rerank(texts=["a", long]),
        )
        for method, request in calls:
            request.truncation = pb.TRUNCATION_END
            await getattr(server.encoding, method)(request)
        assert [[len(ids) for ids in each.inputs][1] for each in server.engine.encode_requests] == [1024] * 5
        _, request = tag(inputs=texts(long), truncation=pb.TRUNCATION_END, top_k=1)
        (tagged,) = (await server.encoding.ClassifyTokens(request)).results
        assert (tagged.num_tokens, len(tagged.tokens), tagged.tokens[-1].end) == (1024, 1023, 1023)
        _, request = rerank(query=long, truncation=pb.TRUNCATION_END)
        refusal = await refused(server.encoding.Rerank(request))
        assert (refusal.reason, refusal.info.metadata["field"]) == ("PROMPT_TOO_LONG", "query")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (classify(task_ids=[]), "generate"),
        (classify(task_ids=["says"]), "generate"),
        (classify(task_ids=["mood", "tags"]), "classify_tokens"),
        (classify(task_ids=["docs"]), "embed"),
        (tag(task_id=""), "generate"),
        (tag(task_id="mood"), "classify"),
        (rerank(task_id="says"), "generate"),
        (rerank(task_id="tags"), "classify_tokens"),
    ],
)
async def test_a_task_of_another_kind_is_refused(call: tuple[str, Any], kind: str) -> None:
    method, request = call
    async with running_server() as server:
        prepared(server)
        refusal = await refused(getattr(server.encoding, method)(request))
        assert server.engine.encode_requests == []
    assert (refusal.code, refusal.reason) == (PRECONDITION, "TASK_KIND_MISMATCH")
    assert dict(refusal.info.metadata) == {"kind": kind}


@pytest.mark.parametrize("task", ["mood", "tags", "docs"])
async def test_a_task_that_reads_does_not_generate(task: str) -> None:
    async with running_server() as server:
        prepared(server)
        for call in (
            server.generation.Generate(gpb.GenerateRequest(task_id=task, text="a")),
            server.generation.Score(
                gpb.ScoreRequest(task_id=task, text="a", continuations=[gpb.Continuation(text="b")])
            ),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (PRECONDITION, "TASK_KIND_MISMATCH")


@pytest.mark.parametrize("method", [embed, tag, rerank])
async def test_unknown_tasks_are_not_found(method: Any) -> None:
    name, request = method(task_id="nothing")
    async with running_server() as server:
        refusal = await refused(getattr(server.encoding, name)(request))
        several = pb.ClassifyRequest(task_ids=["mood", "nothing@2"], inputs=texts("a"))
        prepared(server)
        assert (await refused(server.encoding.Classify(several))).reason == "TASK_NOT_FOUND"
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND")


async def test_an_error_of_one_task_ends_the_call() -> None:
    async with running_server() as server:
        prepared(server)
        server.engine.error = NumericalError("the hidden values are not finite")
        name, request = classify(task_ids=["mood", "rank"])
        refusal = await refused(getattr(server.encoding, name)(request))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "NUMERICAL_ERROR")


async def test_too_many_scores_of_tokens_are_refused_and_fewer_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("manyhats.server.service.encodings.MAX_TOKEN_SCORES", 10)
    async with running_server() as server:
        prepared(server)
        name, request = tag(inputs=texts("abc"))
        refusal = await refused(getattr(server.encoding, name)(request))
        assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("top_k",))
        request.top_k = 2
        assert len((await server.encoding.ClassifyTokens(request)).results[0].tokens) == 3


async def test_adapters_and_server_say_what_they_read() -> None:
    async with running_server() as server:
        prepared(server)
        found = {
            adapter.task_id: adapter
            for adapter in (await server.adapters.ListAdapters(apb.ListAdaptersRequest())).adapters
        }
        info = await server.server.GetServerInfo(spb.GetServerInfoRequest())
    assert {task: apb.TaskKind.Name(each.kind) for task, each in found.items()} == {
        "mood": "TASK_KIND_CLASSIFY",
        "tags": "TASK_KIND_CLASSIFY_TOKENS",
        "rank": "TASK_KIND_CLASSIFY",
        "docs": "TASK_KIND_EMBED",
        "says": "TASK_KIND_GENERATE",
    }
    assert list(found["mood"].class_labels) == ["good", "bad", "so-so"]
    assert list(found["rank"].class_labels) == ["LABEL_0"]
    assert list(found["docs"].class_labels) == list(found["says"].class_labels) == []
    poolings = {task: each.pooling for task, each in found.items()}
    assert (poolings["mood"], poolings["docs"]) == (apb.POOLING_LAST, apb.POOLING_MEAN)
    assert poolings["tags"] == poolings["says"] == apb.POOLING_UNSPECIFIED
    assert (info.attention, info.default_pooling) == ("causal", apb.POOLING_LAST)
    assert set(info.services) == set(SERVICES)
    assert set(replace(INFO, kind=TaskKind.EMBED).services) == {
        name for name in SERVICES if "Generation" not in name
    }


async def test_encodings_are_counted_by_task() -> None:
    async with running_server() as server:
        prepared(server)
        for task in ("mood", "rank"):
            server.metrics.task_changed(task, server.store.versions(task))
        await server.encoding.Classify(pb.ClassifyRequest(task_ids=["mood", "rank"], inputs=texts("a", "b")))
        await server.encoding.Embed(pb.EmbedRequest(inputs=texts("abc")))
        counted = {
            sample.labels["task"]: sample.value
            for metric in server.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "manyhats_tokens_encoded_total"
        }
    assert counted == {
        "mood": 4.0,
        "rank": 4.0,
        "_base": 4.0,
    }
