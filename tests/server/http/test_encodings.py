"""Routes that read texts, on a real engine: numbers are transformers' and PEFT's, also through OpenAI's own client."""

from __future__ import annotations

import base64
import copy
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from manyhats.server.lifetime.config_file import make_config
from support.factories.tiny_models import make_checkpoint, save_tokenizer, tiny_tokenizer
from support.harnesses.engine_server import Ports, served_ports
from support.harnesses.http import Reply, exchange, head, request
from support.harnesses.openai_client import client_of
from support.oracles.classifiers import load_model
from support.oracles.peft import make_peft, save_peft

# PEFT reads names that transformers has deprecated.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4
CONTEXT = 128
VIRTUAL = 5
SIZE = 64
TEXTS = ["the cat and the hat", "a dog", "Es regnet: wo ist mein Hut?"]
MOODS = ("good", "bad", "so so")
# Task → what it does, and its number of labels.
TASKS = {
    "mood": (TaskType.SEQ_CLS, 3),
    "relevance": (TaskType.SEQ_CLS, 1),
    "tags": (TaskType.TOKEN_CLS, 5),
    "vectors": (TaskType.FEATURE_EXTRACTION, 0),
    "plain": (TaskType.CAUSAL_LM, 0),
    "prompted": (TaskType.SEQ_CLS, 3),
}


@dataclass(frozen=True)
class Tasks:
    """A server's ports, its tokenizer, and each task's model by PEFT; the base is ""."""

    ports: Ports
    tokenizer: Tokenizer
    models: dict[str, Any]

    async def post(self, path: str, body: Any, *headers: str) -> Reply:
        return await exchange(self.ports.http, request(path, body, *headers), timeout_s=60)

    @torch.no_grad()
    def logits(self, task: str, text: str | tuple[str, str], limit: int = CONTEXT) -> Any:
        pair = text if isinstance(text, tuple) else (text,)
        cutting = Tokenizer.from_str(self.tokenizer.to_str())
        cutting.enable_truncation(limit)
        ids = torch.tensor([cutting.encode(*pair).ids])
        return self.models[task](input_ids=ids).logits[0].double().numpy()

    @torch.no_grad()
    def vector(self, task: str, ids: list[int] | str, size: int = SIZE) -> Any:
        """The last hidden values, cut and of length 1."""
        ids = self.tokenizer.encode(ids).ids if isinstance(ids, str) else ids
        answer = self.models[task](input_ids=torch.tensor([ids]), output_hidden_states=True)
        found = answer.hidden_states[-1][0, -1, :size]
        return (found / found.norm()).numpy()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tasks(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tasks]:
    directory = tmp_path_factory.mktemp("encodings")
    base = make_checkpoint(directory / "base", seed=8, max_position_embeddings=CONTEXT)
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        pair="<|im_start|> $A <|endoftext|> $B <|endoftext|>",
        special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
    )
    save_tokenizer(base, tokenizer)
    models = {"": load_model(base)}
    for name, (kind, num_labels) in TASKS.items():
        config: Any = LoraConfig(task_type=kind, r=4, target_modules=["q_proj", "down_proj"])
        if name == "prompted":
            config = PromptTuningConfig(task_type=kind, num_virtual_tokens=VIRTUAL)
        models[name] = make_peft(copy.deepcopy(load_model(base, kind, num_labels)), config, size=0.3)
        save_peft(models[name], directory / name)
    settings = make_config(
        {
            "model": str(base),
            "base_names": ("small",),
            "store": directory / "store",
            "adapter_roots": (directory,),
            "dtype": "float32",
            "quantization": "none",
            "num_threads": 1,
            "kv_cache_bytes": 4 << 20,
        }
    )
    async with served_ports(settings) as ports:
        served = Tasks(ports, tokenizer, models)
        for name in TASKS:
            labels = {f"class.{i}": mood for i, mood in enumerate(MOODS)} if name == "mood" else {}
            reply = await served.post(
                "/v1/tasks", {"taskId": name, "uri": str(directory / name), "labels": labels}
            )
            assert reply.status == 200, reply
        yield served


@pytest.mark.parametrize("task", ["", "vectors", "plain"])
@pytest.mark.parametrize("encoding_format", ["float", "base64", openai.omit])
async def test_openais_client_gets_the_models_own_vectors(
    tasks: Tasks, task: str, encoding_format: Any
) -> None:
    # As far as its description goes, vectors are never in base64, although the client asks for it.
    is_strict = encoding_format == "float"
    async with client_of(tasks.ports, is_strict=is_strict) as client:
        found = await client.embeddings.create(
            model=task, input=TEXTS, encoding_format=encoding_format, user="me"
        )
    assert [each.index for each in found.data] == [0, 1, 2]
    assert found.usage.prompt_tokens == found.usage.total_tokens
    assert found.usage.prompt_tokens == sum(len(tasks.tokenizer.encode(text).ids) for text in TEXTS)
    for text, each in zip(TEXTS, found.data, strict=True):
        vector = each.embedding
        if isinstance(vector, str):  # what is asked for by name is left as it is
            vector = np.frombuffer(base64.b64decode(vector), "<f4").tolist()
        np.testing.assert_allclose(vector, tasks.vector(task, text), atol=TOLERANCE)


async def test_inputs_are_texts_token_ids_or_lists_of_them(tasks: Tasks) -> None:
    ids = [tasks.tokenizer.encode(text).ids for text in TEXTS]
    given: list[Any] = [TEXTS, ids, [TEXTS[0], ids[1], ids[2]]]
    found = [(await tasks.post("/v1/embeddings", {"input": each})).json for each in given]
    assert found[0]["data"] == found[1]["data"] == found[2]["data"]
    assert (found[0]["object"], found[0]["model"], found[0]["data"][1]["object"]) == (
        "list",
        "base",
        "embedding",
    )
    for one in (TEXTS[0], ids[0]):
        reply = await tasks.post("/v1/embeddings", {"input": one, "model": "small"})
        assert reply.json["data"] == found[0]["data"][:1]


async def test_vectors_are_cut_and_then_have_length_one(tasks: Tasks) -> None:
    reply = await tasks.post("/v1/embeddings", {"input": TEXTS[0], "model": "vectors", "dimensions": 5})
    np.testing.assert_allclose(
        reply.json["data"][0]["embedding"], tasks.vector("vectors", TEXTS[0], 5), atol=TOLERANCE
    )
    assert reply.headers["x-manyhats-version"] == "vectors@1"


async def test_tei_s_embed_gives_the_same_vectors(tasks: Tasks) -> None:
    openai_s = (await tasks.post("/v1/embeddings", {"input": TEXTS, "model": "vectors"})).json["data"]
    wanted = [each["embedding"] for each in openai_s]
    by_model = await tasks.post("/embed", {"inputs": TEXTS, "model": "vectors"})
    by_header = await tasks.post("/embed", {"inputs": TEXTS, "normalize": True}, "X-Task-Id: vectors")
    assert by_model.json == by_header.json == wanted
    one = await tasks.post(
        "/embed", {"inputs": TEXTS[0], "normalize": False, "dimensions": 3}, "x-task-id: vectors"
    )
    (vector,) = one.json
    scaled = np.array(vector) / np.linalg.norm(vector)
    assert len(vector) == 3
    assert abs(np.linalg.norm(vector) - 1) > 0.1
    np.testing.assert_allclose(scaled, tasks.vector("vectors", TEXTS[0], 3), atol=TOLERANCE)


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
async def test_classes_are_the_heads(tasks: Tasks, path: str) -> None:
    reply = await tasks.post(path, {"model": "mood", "input": TEXTS})
    assert (reply.status, reply.json["model"], reply.headers["x-manyhats-version"]) == (200, "mood", "mood@1")
    for index, (text, each) in enumerate(zip(TEXTS, reply.json["data"], strict=True)):
        shares = softmax(tasks.logits("mood", text))
        np.testing.assert_allclose(each["probs"], shares, atol=TOLERANCE)
        assert (each["index"], each["num_classes"]) == (index, 3)
        assert each["label"] == MOODS[int(np.argmax(shares))]
    one = await tasks.post(path, {"model": "mood@1", "input": TEXTS[0]})
    assert one.json["data"] == reply.json["data"][:1]


async def test_tei_s_info_says_what_a_task_does(tasks: Tasks) -> None:
    async def ask(path: str, *headers: str) -> Reply:
        return await exchange(tasks.ports.http, request(path, b"", *headers, method="GET"), timeout_s=60)

    base = (await ask("/info")).json
    assert base["model_type"] == {"embedding": {"pooling": "last_token"}}
    assert (base["model_dtype"], base["max_input_length"], base["auto_truncate"]) == (
        "float32",
        CONTEXT,
        False,
    )
    mood = (await ask("/info?model=mood")).json
    assert mood["model_id"] == "mood"
    names = mood["model_type"]["classifier"]["id2label"]
    predicted = (await tasks.post("/predict", {"model": "mood", "inputs": "a"})).json
    assert sorted(names.values()) == sorted(each["label"] for each in predicted)
    assert mood["model_type"]["classifier"]["label2id"] == {name: int(at) for at, name in names.items()}
    ranking = (await ask("/info", "X-Task-Id: relevance")).json
    assert ranking["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    assert (await ask("/info?model=vectors")).json["model_sha"] != base["model_sha"]
    assert (await ask("/info?model=no")).status == 404
    refused = await ask("/info?model=tags")
    assert (refused.status, refused.json["error"]["code"]) == (400, "task_kind_mismatch")


async def test_tei_s_predictions_are_sorted(tasks: Tasks) -> None:
    pair, alone = ("the cat", "the hat"), TEXTS[1]
    batch = await tasks.post("/predict", {"model": "mood", "inputs": [[alone], list(pair), alone]})
    one = await tasks.post("/predict", {"inputs": alone}, "X-Task-Id: mood")
    two = await tasks.post("/predict", {"inputs": list(pair)}, "X-Task-Id: mood")
    assert batch.json == [one.json, two.json, one.json]
    for reply, text in ((one, alone), (two, pair)):
        shares = softmax(tasks.logits("mood", text))
        order = np.argsort(-shares)
        assert [each["label"] for each in reply.json] == [MOODS[index] for index in order]
        np.testing.assert_allclose([each["score"] for each in reply.json], shares[order], atol=TOLERANCE)
    raw = await tasks.post("/predict", {"model": "mood", "inputs": alone, "raw_scores": True})
    logits = np.sort(tasks.logits("mood", alone))[::-1]
    np.testing.assert_allclose([each["score"] for each in raw.json], logits, atol=TOLERANCE)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
async def test_documents_are_ranked_in_both_forms(tasks: Tasks, path: str) -> None:
    query = "where is the hat"
    logits = [float(tasks.logits("relevance", (query, text))[0]) for text in TEXTS]
    order = sorted(range(3), key=lambda index: -logits[index])
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    jina = await tasks.post(path, {"model": "relevance", "query": query, "documents": documents})
    results = jina.json["results"]
    assert [each["index"] for each in results] == order
    assert [each["relevance_score"] for each in results] == [
        pytest.approx(1 / (1 + math.exp(-logits[index])), abs=TOLERANCE) for index in order
    ]
    assert all("document" not in each for each in results)
    assert (jina.json["model"], jina.headers["x-manyhats-version"]) == ("relevance", "relevance@1")
    best = await tasks.post(
        path,
        {"model": "relevance", "query": query, "documents": documents, "top_n": 1, "return_documents": True},
    )
    assert best.json["results"] == [{**results[0], "document": {"text": TEXTS[order[0]]}}]
    tei = await tasks.post(path, {"query": query, "texts": TEXTS}, "X-Task-Id: relevance")
    assert tei.json == [{"index": each["index"], "score": each["relevance_score"]} for each in results]
    raw = await tasks.post(
        path, {"model": "relevance", "query": query, "texts": TEXTS, "raw_scores": True, "return_text": True}
    )
    assert [(each["index"], each["text"]) for each in raw.json] == [(index, TEXTS[index]) for index in order]
    assert [each["score"] for each in raw.json] == [
        pytest.approx(logits[index], abs=TOLERANCE) for index in order
    ]


LONG = "many words " * CONTEXT


async def test_tei_s_truncate_cuts_texts_within_their_special_tokens(tasks: Tasks) -> None:
    ids = tasks.tokenizer.encode(LONG).ids
    cut = [*ids[: CONTEXT - 1], ids[-1]]
    embedded = await tasks.post("/embed", {"model": "vectors", "inputs": ["a", LONG], "truncate": True})
    np.testing.assert_allclose(embedded.json[1], tasks.vector("vectors", cut), atol=TOLERANCE)
    pair = ["the cat " * 40, LONG]
    for task, limit in (("mood", CONTEXT), ("prompted", CONTEXT - VIRTUAL)):
        for inputs, text in ((LONG, LONG), (pair, (pair[0], pair[1]))):
            body = {"model": task, "inputs": inputs, "raw_scores": True, "truncate": True}
            reply = await tasks.post("/predict", {**body, "truncation_direction": "Right"})
            logits = np.sort(tasks.logits(task, text, limit))[::-1]
            np.testing.assert_allclose([each["score"] for each in reply.json], logits, atol=TOLERANCE)
    ranked = await tasks.post(
        "/rerank",
        {"model": "relevance", "query": "a cat", "texts": [LONG], "raw_scores": True, "truncate": True},
    )
    (score,) = [each["score"] for each in ranked.json]
    assert score == pytest.approx(float(tasks.logits("relevance", ("a cat", LONG))[0]), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/embed", {"inputs": [[5] * (CONTEXT + 1)], "truncate": True}, "inputs[0]"),
        ("/predict", {"model": "prompted", "inputs": [["a"], [LONG]]}, "inputs[1]"),
        ("/rerank", {"model": "relevance", "query": LONG, "texts": ["a"], "truncate": True}, "query"),
    ],
)
async def test_what_is_not_cut_is_refused(tasks: Tasks, path: str, body: Any, param: str) -> None:
    reply = await tasks.post(path, body)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (
        400,
        "context_length_exceeded",
        param,
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("/v1/embeddings", {"model": "no", "input": "a"}, 404, "model", "model_not_found"),
        ("/v1/embeddings", {"model": "mood", "input": "a"}, 400, "model", "task_kind_mismatch"),
        ("/v1/embeddings", {"model": "tags", "input": "a"}, 400, "model", "task_kind_mismatch"),
        ("/v1/embeddings", {"input": "a", "dimensions": SIZE + 1}, 400, "dimensions", "invalid_value"),
        ("/v1/embeddings", {"input": LONG}, 400, "input[0]", "context_length_exceeded"),
        ("/v1/embeddings", {"input": [[5] * (CONTEXT + 1)]}, 400, "input[0]", "context_length_exceeded"),
        ("/v1/embeddings", {"input": ["a", [10**6]]}, 400, "input[1]", "invalid_value"),
        ("/embed", {"model": "no", "inputs": "a"}, 404, "model", "model_not_found"),
        ("/embed", {"model": "mood", "inputs": "a"}, 400, "model", "task_kind_mismatch"),
        ("/embed", {"inputs": ["a", LONG]}, 400, "inputs[1]", "context_length_exceeded"),
        ("/v1/classify", {"model": "no", "input": "a"}, 404, "model", "model_not_found"),
        ("/v1/classify", {"model": "vectors", "input": "a"}, 400, "model", "task_kind_mismatch"),
        ("/v1/classify", {"model": "tags", "input": "a"}, 400, "model", "task_kind_mismatch"),
        ("/v1/classify", {"model": "plain", "input": "a"}, 400, "model", "invalid_value"),
        ("/v1/classify", {"input": "a"}, 400, "model", "invalid_value"),
        ("/v1/classify", {"model": "mood", "input": ["a", LONG]}, 400, "input[1]", "context_length_exceeded"),
        ("/v1/classify", {"model": "mood", "input": ["a", ""]}, 400, "input[1]", "invalid_value"),
        ("/v1/classify", {"model": "mood", "input": []}, 400, "input", "invalid_value"),
        ("/predict", {"model": "plain", "inputs": "a"}, 400, "model", "task_kind_mismatch"),
        ("/predict", {"inputs": "a"}, 400, "model", "task_kind_mismatch"),
        ("/predict", {"model": "mood", "inputs": [["a", LONG]]}, 400, "inputs[0]", "context_length_exceeded"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 400, "model", "task_kind_mismatch"),
        ("/rerank", {"model": "vectors", "query": "a", "texts": ["b"]}, 400, "model", "task_kind_mismatch"),
        ("/rerank", {"model": "mood", "query": "a", "texts": ["b"]}, 400, "model", "invalid_value"),
        ("/rerank", {"model": "relevance", "query": "a", "texts": ["b", LONG]}, 400, "texts[1]", None),
        ("/rerank", {"model": "relevance", "query": "a", "documents": [LONG]}, 400, "documents[0]", None),
        ("/v1/completions", {"model": "mood", "prompt": "a"}, 400, "model", "task_kind_mismatch"),
        (
            "/v1/chat/completions",
            {"model": "vectors", "messages": [{"role": "user", "content": "a"}]},
            400,
            "model",
            "task_kind_mismatch",
        ),
        ("/v1/score", {"model": "tags", "prompt": "a", "continuations": ["b"]}, 400, "model", None),
    ],
)
async def test_refusals_name_what_is_wrong(
    tasks: Tasks, path: str, body: Any, status: int, param: str, code: str | None
) -> None:
    reply = await tasks.post(path, body)
    assert (reply.status, reply.error["type"], reply.error["param"]) == (
        status,
        "invalid_request_error",
        param,
    ), reply
    assert code in (None, reply.error["code"])


async def test_what_is_read_is_counted_by_task(tasks: Tasks) -> None:
    async def counted() -> float:
        text = (await exchange(tasks.ports.http, head("/metrics", None, method="GET"))).body.decode()
        lines = [line for line in text.splitlines() if line.startswith("manyhats_tokens_encoded_total{")]
        return sum(float(line.split()[-1]) for line in lines if 'task="mood"' in line)

    before = await counted()
    await tasks.post("/classify", {"model": "mood", "input": TEXTS})
    assert await counted() - before == sum(len(tasks.tokenizer.encode(text).ids) for text in TEXTS)


def softmax(logits: Any) -> Any:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
