"""Classes of texts and of tokens, and embeddings, by task: in one batch, beside generation, against PEFT's models."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.request import EncodeRequest
from support.factories.tiny_models import TINY_VOCAB_SIZE, linears_of, make_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, random_ids, running_engine
from support.oracles.peft import make_peft, save_peft

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
PAD = 2
TEXTS = [random_ids(length, length, TINY_VOCAB_SIZE) for length in (1, 9, 40, 70)]
TEXTS += [[*random_ids(3, 12, TINY_VOCAB_SIZE), PAD, PAD], [PAD, PAD]]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"kv_heads": 4},
    "opt": {"kv_heads": 4, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
}
CONFIGS: Mapping[str, Any] = {
    "lora": lambda names: LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=names),
    "ia3": lambda names: IA3Config(
        task_type=TaskType.SEQ_CLS, target_modules=names, feedforward_modules=names[-1:]
    ),
    "prefix": lambda names: PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5),
    "prompt": lambda names: PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5),
    "p-tuning": lambda names: PromptEncoderConfig(
        task_type=TaskType.SEQ_CLS, num_virtual_tokens=5, encoder_hidden_size=12
    ),
    "tokens": lambda names: LoraConfig(task_type=TaskType.TOKEN_CLS, r=4, target_modules=names),
}
NUM_LABELS = {"lora": 2, "ia3": 7, "prefix": 3, "prompt": 4, "p-tuning": 1, "tokens": 5}
Found = tuple[dict[str, AdapterRecord], dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]


def load_classifier(directory: Path, kind: str, num_labels: int) -> Any:
    transformers: Any = import_module("transformers")
    auto = transformers.AutoModelForTokenClassification
    if kind != "tokens":
        auto = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(num_labels)
        model = auto.from_pretrained(
            directory, num_labels=num_labels, dtype=torch.float32, attn_implementation="eager"
        )
    model.train(False)
    return model


@torch.no_grad()
def expected_of(peft: Any, kind: str) -> list[np.ndarray]:
    found = []
    for ids in TEXTS:
        logits = peft(input_ids=torch.tensor([ids])).logits[0]
        found.append(logits.numpy() if kind == "tokens" else logits[None].numpy())
    return found


def kinds_of(family: str) -> list[str]:
    """PEFT has no prompts where the embedding is narrower than the stream."""
    return [kind for kind in CONFIGS if family != "opt" or kind not in ("prompt", "p-tuning", "tokens")]


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Records, what the engine found of every text in one batch over all tasks, and what PEFT finds."""
    directory, family = tmp_path_factory.mktemp("heads"), request.param
    checkpoint = make_checkpoint(directory / "model", family, seed=8, **FAMILIES[family])
    expected = {}
    for kind in kinds_of(family):
        model = load_classifier(checkpoint, kind, NUM_LABELS[kind])
        peft = make_peft(copy.deepcopy(model), CONFIGS[kind](linears_of(family)), size=0.3)
        save_peft(peft, directory / kind)
        expected[kind] = expected_of(peft, kind)
    records, answers = asyncio.run(answer_all(directory, checkpoint, list(expected)))
    return records, answers, expected


async def answer_all(
    directory: Path, checkpoint: Path, kinds: list[str]
) -> tuple[dict[str, AdapterRecord], dict[str, list[np.ndarray]]]:
    model = load_tiny(checkpoint)
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        records = {
            kind: store.register(Registration(kind, Uri(str(directory / kind)))).record for kind in kinds
        }
        async with running_engine(model, store.lower, max_num_batched_tokens=48) as engine:
            generation = asyncio.create_task(collect(engine, make_request(TEXTS[1], new_tokens=20)))
            outputs = await asyncio.gather(
                *(
                    engine.encode(
                        EncodeRequest(id=kind, inputs=tuple(map(tuple, TEXTS)), adapter=records[kind])
                    )
                    for kind in kinds
                )
            )
            alone = [
                await engine.encode(EncodeRequest(id="alone", inputs=(tuple(text),), adapter=records[kind]))
                for kind in kinds
                for text in TEXTS
            ]
            await generation
    together = [values for output in outputs for values in output.values]
    for one, same in zip(alone, together, strict=True):
        assert np.array_equal(one.values[0], same)
    assert [output.usage.prompt_tokens for output in outputs] == [sum(map(len, TEXTS))] * len(kinds)
    return records, {kind: list(output.values) for kind, output in zip(kinds, outputs, strict=True)}


def test_logits_are_peft_s(found: Found) -> None:
    _, answers, expected = found
    for kind, wanted in expected.items():
        for ours, theirs in zip(answers[kind], wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE, err_msg=kind)


def test_records_say_what_a_task_does(found: Found) -> None:
    records, _, _ = found
    for kind, record in records.items():
        assert record.kind is (TaskKind.CLASSIFY_TOKENS if kind == "tokens" else TaskKind.CLASSIFY)


@pytest.mark.parametrize("pooling", Pooling, ids=lambda pooling: pooling.value)
def test_pooled_hidden_values_are_transformers_s(tmp_path: Path, pooling: Pooling) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", seed=8)
    transformers: Any = import_module("transformers")
    reference = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(False)

    async def encode() -> list[np.ndarray]:
        async with running_engine(load_tiny(checkpoint), max_num_batched_tokens=16) as engine:
            asked = EncodeRequest(id="a", inputs=tuple(map(tuple, TEXTS)), pooling=pooling)
            return list((await engine.encode(asked)).values)

    for ids, ours in zip(TEXTS, asyncio.run(encode()), strict=True):
        with torch.no_grad():
            rows = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
        wanted = {
            Pooling.FIRST: rows[:1],
            Pooling.LAST: rows[-1:],
            Pooling.MEAN: rows.mean(0, keepdim=True),
            Pooling.MAX: rows.amax(0, keepdim=True),
            Pooling.ALL: rows,
        }[pooling]
        np.testing.assert_allclose(ours, wanted.numpy(), atol=TOLERANCE, rtol=TOLERANCE)
