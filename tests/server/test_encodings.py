"""What tasks read in texts, over a real port: adapters as PEFT makes them, on one engine beside generation."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType

from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.heads import Pooling
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.client import AsyncClient, TaskKindError
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.v1 import adapter_pb2 as apb
from manyhats.v1 import encoding_pb2 as pb
from manyhats.v1 import generation_pb2 as gpb
from support.factories.tiny_models import linears_of, make_checkpoint
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import served_engine
from support.oracles.peft import make_peft, save_peft

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["The hat is red.", "an", "Jörg and the cat live in a hat."]
MOODS = {"class.0": "good", "class.1": "bad", "class.2": "so-so"}
TAGS = {"class.0": "O", "class.1": "B-PER", "class.2": "I-PER"}
TASKS: Mapping[str, tuple[TaskType, int, Mapping[str, str]]] = {
    "mood": (TaskType.SEQ_CLS, 3, MOODS),
    "topic": (TaskType.SEQ_CLS, 2, {"classify.activation": "sigmoid"}),
    "rank": (TaskType.SEQ_CLS, 1, {"class.0": "relevance"}),
    "tags": (TaskType.TOKEN_CLS, 3, TAGS),
    "docs": (TaskType.FEATURE_EXTRACTION, 0, {}),
}
TOLERANCE = 1e-4


def load_reference(checkpoint: Path, task_type: TaskType, num_labels: int) -> Any:
    transformers: Any = import_module("transformers")
    auto = {
        TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
        TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
        TaskType.FEATURE_EXTRACTION: transformers.AutoModel,
    }[task_type]
    more = {"num_labels": num_labels} if num_labels else {}
    with torch.random.fork_rng():
        torch.manual_seed(num_labels)
        model = auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager", **more)
    model.train(False)
    return model


class Prepared:
    """A tiny model, a store with a task of each kind, and PEFT's models of them."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint = make_checkpoint(directory / "model", seed=8)
        self.model: LoadedModel = load_tiny(self.checkpoint)
        self.peft: dict[str, Any] = {}
        self.store: AdapterStore = open_store(directory / "store", self.model.description, [directory])
        for task, (task_type, num_labels, labels) in TASKS.items():
            config = LoraConfig(task_type=task_type, r=4, target_modules=linears_of("llama"))
            reference = load_reference(self.checkpoint, task_type, num_labels)
            self.peft[task] = make_peft(copy.deepcopy(reference), config, size=0.3)
            save_peft(self.peft[task], directory / task)
            self.store.register(Registration(task, Uri(str(directory / task)), labels=labels))

    @torch.no_grad()
    def read(self, task: str, text: str, pair: str | None = None) -> np.ndarray:
        """PEFT's logits, or the last layer's hidden values."""
        ids = self.model.tokenizer.read(text, add_special_tokens=True, first=pair).token_ids
        output = self.peft[task](input_ids=torch.tensor([list(ids)]))
        values = output.last_hidden_state if task == "docs" else output.logits
        return np.asarray(values[0], dtype=np.float64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Prepared(tmp_path_factory.mktemp("encodings"))
    yield made
    made.store.close()


def inputs(*texts: str) -> list[pb.TextInput]:
    return [pb.TextInput(text=text) for text in texts]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return shares


async def test_a_label_says_what_makes_a_task_s_vectors(prepared: Prepared) -> None:
    with pytest.raises(
        ArgumentInvalidError, match=r"labels\[embed.pooling\]: must be one of first, last, mean, max"
    ):
        Registration("x", Uri("x"), labels={"embed.pooling": "all"})
    with pytest.raises(ArgumentInvalidError, match=r"labels\[embed.dimensions\]: is not known"):
        Registration("x", Uri("x"), labels={"embed.dimensions": "9"})
    source = Uri(str(prepared.checkpoint.parent / "docs"))
    registered = prepared.store.register(
        Registration("docs-mean", source, labels={"embed.pooling": "mean"})
    ).record
    assert registered.pooling is Pooling.MEAN
    async with served_engine(prepared.model, prepared.store) as served:
        own = await served.encoding.Embed(pb.EmbedRequest(task_id="docs-mean", inputs=inputs(*TEXTS)))
        named = await served.encoding.Embed(
            pb.EmbedRequest(task_id="docs", inputs=inputs(*TEXTS), pooling=apb.POOLING_MEAN)
        )
        other = await served.encoding.Embed(
            pb.EmbedRequest(task_id="docs-mean", inputs=inputs(*TEXTS), pooling=apb.POOLING_LAST)
        )
        usual = await served.encoding.Embed(pb.EmbedRequest(task_id="docs", inputs=inputs(*TEXTS)))
    assert [list(each.values) for each in own.embeddings] == [list(each.values) for each in named.embeddings]
    assert [list(each.values) for each in other.embeddings] == [
        list(each.values) for each in usual.embeddings
    ]
    assert list(own.embeddings[0].values) != list(usual.embeddings[0].values)


async def test_classes_are_peft_s_of_each_task(prepared: Prepared) -> None:
    async with served_engine(prepared.model, prepared.store) as served:
        request = pb.ClassifyRequest(task_ids=["mood", "topic@1"], inputs=inputs(*TEXTS))
        beside = served.generation.Generate(gpb.GenerateRequest(text="the"))
        answer, _ = await asyncio.gather(served.encoding.Classify(request), beside)
    assert [each.adapter.task_id for each in answer.results] == ["mood", "topic"] * len(TEXTS)
    for index, result in enumerate(answer.results):
        task, text = ("mood", "topic")[index % 2], TEXTS[index // 2]
        logits = prepared.read(task, text)
        scores = softmax(logits) if task == "mood" else 1 / (1 + np.exp(-logits))
        names = list(MOODS.values()) if task == "mood" else ["LABEL_0", "LABEL_1"]
        assert [each.index for each in result.classes] == np.argsort(-logits).tolist()
        for each in result.classes:
            assert each.label == names[each.index]
            assert each.logit == pytest.approx(logits[each.index], abs=TOLERANCE)
            assert each.score == pytest.approx(scores[each.index], abs=TOLERANCE)


async def test_classes_of_tokens_are_peft_s(prepared: Prepared) -> None:
    async with served_engine(prepared.model, prepared.store) as served:
        request = pb.ClassifyTokensRequest(task_id="tags", inputs=inputs(*TEXTS))
        answer = await served.encoding.ClassifyTokens(request)
        request.aggregation = pb.AGGREGATION_SIMPLE
        grouped = await served.encoding.ClassifyTokens(request)
    for text, tagged, found in zip(TEXTS, answer.results, grouped.results, strict=True):
        logits = prepared.read("tags", text)
        assert [each.token_index for each in tagged.tokens] == list(range(len(logits)))
        for token, row in zip(tagged.tokens, logits, strict=True):
            assert [each.index for each in token.classes] == np.argsort(-row).tolist()
            assert token.classes[0].score == pytest.approx(softmax(row).max(), abs=TOLERANCE)
        covered = "".join(text[token.start : token.end] for token in tagged.tokens if token.end > token.start)
        assert covered.replace("öö", "ö") == text
        assert all(
            each.text == text[each.start : each.end] and each.label == "PER" for each in found.entities
        )


async def test_vectors_are_peft_s_by_every_pooling(prepared: Prepared) -> None:
    poolings = {
        apb.POOLING_UNSPECIFIED: lambda rows: rows[-1],
        apb.POOLING_FIRST: lambda rows: rows[0],
        apb.POOLING_LAST: lambda rows: rows[-1],
        apb.POOLING_MEAN: lambda rows: rows.mean(axis=0),
        apb.POOLING_MAX: lambda rows: rows.max(axis=0),
    }
    async with served_engine(prepared.model, prepared.store) as served:
        for pooling, pool in poolings.items():
            for dimensions in (0, 7):
                request = pb.EmbedRequest(
                    task_id="docs", inputs=inputs(*TEXTS), pooling=pooling, dimensions=dimensions
                )
                answer = await served.encoding.Embed(request)
                assert answer.base_digest == prepared.model.description.digest
                for text, embedding in zip(TEXTS, answer.embeddings, strict=True):
                    wanted = pool(prepared.read("docs", text))[: dimensions or None]
                    wanted = wanted / math.sqrt(float(wanted @ wanted))
                    np.testing.assert_allclose(embedding.values, wanted, atol=TOLERANCE)


async def test_relevance_is_peft_s_of_the_pair(prepared: Prepared) -> None:
    async with served_engine(prepared.model, prepared.store) as served:
        request = pb.RerankRequest(task_id="rank", query="a red hat", texts=TEXTS, raw_scores=True)
        answer = await served.encoding.Rerank(request)
    scores = [float(prepared.read("rank", text, "a red hat")[0]) for text in TEXTS]
    assert [each.index for each in answer.results] == np.argsort(-np.array(scores)).tolist()
    for each in answer.results:
        assert each.score == pytest.approx(scores[each.index], abs=TOLERANCE)


async def test_the_client_reads_all_of_it(prepared: Prepared) -> None:
    async with (
        served_engine(prepared.model, prepared.store) as served,
        AsyncClient(served.address) as client,
    ):
        vectors = (await client.embed([*TEXTS, ("a red", "hat"), [5, 6]], pooling="mean")).vectors
        assert vectors.shape == (len(TEXTS) + 2, prepared.model.description.embedding_size)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        classified = await client.classify(TEXTS[:1], task_id=["mood", "topic"])
        assert [each.label for each in classified.results] == [
            names[int(prepared.read(task, TEXTS[0]).argmax())]
            for task, names in (("mood", list(MOODS.values())), ("topic", ["LABEL_0", "LABEL_1"]))
        ]
        tokens = (await client.tag(TEXTS[:1], task_id="tags", aggregation="none")).results[0].tokens
        best = prepared.read("tags", TEXTS[0]).argmax(axis=1)
        assert [token.classes[0].index for token in tokens] == best.tolist()
        ranked = await client.rerank("a red hat", TEXTS, task_id="rank", return_texts=True)
        assert [TEXTS[each.index] for each in ranked.results] == [each.text for each in ranked.results]
        with pytest.raises(TaskKindError, match="docs@1 does not classify texts: its kind is embed"):
            await client.classify(TEXTS, task_id="docs")
        with pytest.raises(TaskKindError, match="docs@1 does not rank texts: its kind is embed"):
            await client.rerank("hat", TEXTS, task_id="docs")
        with pytest.raises(TaskKindError, match="mood@1 does not classify tokens: its kind is classify"):
            await client.tag(TEXTS, task_id="mood")
        with pytest.raises(TaskKindError, match="mood@1 does not embed unless a pooling is named"):
            await client.embed(TEXTS, task_id="mood")
        info = await client.server_info()
        assert info.embedding_size == prepared.model.description.embedding_size


async def test_tokens_of_a_text_are_those_that_are_read() -> None:
    model = load_model("all-minilm-l6-v2", quantization="none", dtype=torch.float32)
    text = "That is a happy person"
    async with served_engine(model) as served, AsyncClient(served.address) as client:
        tokenized = await client.tokenize(text)
        read = await client.embed([text])
    assert list(tokenized.ids) == list(model.tokenizer.read(text, add_special_tokens=True).token_ids)
    assert tokenized.ids[-1] == 102  # [SEP]
    assert read.usage.prompt_tokens == len(tokenized.ids)


def test_records_survive_a_new_start_with_what_they_say_of_their_heads(prepared: Prepared) -> None:
    mood, tags = prepared.store.resolve("mood"), prepared.store.resolve("tags")
    assert (mood.num_classes, mood.class_names) == (3, ("good", "bad", "so-so"))
    assert prepared.store.resolve("topic").class_names == ("LABEL_0", "LABEL_1")
    assert (mood.pooling, tags.pooling) == (Pooling.LAST, Pooling.ALL)
    root = Path(mood.source).parent
    with opened(root, prepared.model) as again:
        for task in TASKS:
            assert again.resolve(task) == prepared.store.resolve(task)


def opened(root: Path, model: LoadedModel) -> Any:
    return closing(open_store(root / "store", model.description, [root]))


@pytest.mark.parametrize(
    ("task", "labels", "field"),
    [
        ("mood", {"class.0": "a", "class.1": "b"}, "labels"),
        ("mood", {"class.0": "a"}, "labels"),
        ("tags", {"class.0": "a"}, "labels"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(
    prepared: Prepared, task: str, labels: Mapping[str, str], field: str
) -> None:
    source = prepared.store.resolve(task).source
    with pytest.raises(ArgumentInvalidError) as caught:
        prepared.store.register(Registration("new", Uri(source), labels=labels))
    assert caught.value.subject == field


@pytest.mark.parametrize(
    ("labels", "field"),
    [({"class.0": "a"}, "labels"), ({"classify.activation": "none"}, "labels[classify.activation]")],
)
def test_what_labels_say_of_a_head_needs_one(
    prepared: Prepared, labels: Mapping[str, str], field: str, tmp_path: Path
) -> None:
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(prepared.checkpoint, dtype=torch.float32)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=linears_of("llama"))
    save_peft(make_peft(model, config, size=0.3), tmp_path / "says")
    with opened(tmp_path, prepared.model) as store:
        with pytest.raises(ArgumentInvalidError) as caught:
            store.register(Registration("says", Uri(str(tmp_path / "says")), labels=labels))
        store.register(Registration("says", Uri(str(tmp_path / "says"))))
    assert caught.value.subject == field
