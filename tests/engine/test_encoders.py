"""Encoders with every method and head of PEFT, against PEFT; many tasks in a batch as each alone."""

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
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
)

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import EncodeRequest
from support.factories.tiny_encoders import ENCODERS, LINEARS, make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.engine import load_tiny, random_ids, running_engine
from support.oracles.peft import make_peft, save_peft

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
TEXTS = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (1, 9, 40, 70, 200))
VIRTUAL = 5
AUTO = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
CONFIGS: Mapping[str, Any] = {
    "lora": lambda names: LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=names),
    "dora": lambda names: LoraConfig(task_type=TaskType.SEQ_CLS, r=4, use_dora=True, target_modules=names),
    "adalora": lambda names: AdaLoraConfig(
        task_type=TaskType.SEQ_CLS, init_r=4, total_step=9, target_modules=names
    ),
    "vera": lambda names: VeraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=names),
    "ia3": lambda names: IA3Config(
        task_type=TaskType.SEQ_CLS, target_modules=names, feedforward_modules=names[-1:]
    ),
    "prefix": lambda names: PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=VIRTUAL),
    "prompt": lambda names: PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda names: PromptEncoderConfig(
        task_type=TaskType.SEQ_CLS, num_virtual_tokens=VIRTUAL, encoder_hidden_size=12
    ),
    "tokens": lambda names: LoraConfig(task_type=TaskType.TOKEN_CLS, r=4, target_modules=names),
    "prompted-tokens": lambda names: PromptTuningConfig(
        task_type=TaskType.TOKEN_CLS, num_virtual_tokens=VIRTUAL
    ),
    "span": lambda names: LoraConfig(task_type=TaskType.QUESTION_ANS, r=4, target_modules=names),
    "vectors": lambda names: LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=names),
}
KINDS = {
    "tokens": TaskKind.CLASSIFY_TOKENS,
    "prompted-tokens": TaskKind.CLASSIFY_TOKENS,
    "span": TaskKind.SPAN,
    "vectors": TaskKind.EMBED,
}
Found = tuple[dict[str, AdapterRecord], dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]


def names_of(family: str) -> list[str]:
    """PEFT has no prefix on DistilBERT, and no prompts where it does not know sizes, or the embedding is narrower."""
    left_out = {"distilbert": ("prefix", "prompt", "p-tuning", "prompted-tokens")}
    left_out["electra"] = ("prompt", "p-tuning", "prompted-tokens")
    return [name for name in CONFIGS if name not in left_out.get(family, ())]


def load_reference(directory: Path, task_type: str, seed: int) -> Any:
    transformers: Any = import_module("transformers")
    options = {} if task_type == TaskType.FEATURE_EXTRACTION else {"num_labels": 2 + seed % 5}
    if task_type == TaskType.QUESTION_ANS:
        options = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, AUTO[task_type]).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", **options
        )
    model.train(False)
    return model


@torch.no_grad()
def expected_of(peft: Any, name: str) -> list[np.ndarray]:
    found = []
    for ids in TEXTS:
        output = peft(input_ids=torch.tensor([ids]))
        if name == "vectors":
            value = output.last_hidden_state[0].mean(0, keepdim=True)
        elif name == "span":
            value = torch.stack((output.start_logits[0], output.end_logits[0]), dim=1)
        else:
            value = output.logits if output.logits.dim() == 2 else output.logits[0, -len(ids) :]
        found.append(value.numpy())
    return found


@pytest.fixture(scope="module", params=ENCODERS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Records, what the engine found of every text in one batch over all tasks, and what PEFT finds."""
    directory, family = tmp_path_factory.mktemp("encoders"), request.param
    checkpoint = make_encoder(directory / "model", family, seed=8)
    expected = {}
    for seed, name in enumerate(names_of(family)):
        config = CONFIGS[name](list(LINEARS[family]))
        peft = make_peft(copy.deepcopy(load_reference(checkpoint, config.task_type, seed)), config, size=0.3)
        save_peft(peft, directory / name)
        expected[name] = expected_of(peft, name)
    records, answers = asyncio.run(answer_all(directory, checkpoint, list(expected)))
    return records, answers, expected


async def answer_all(
    directory: Path, checkpoint: Path, names: list[str]
) -> tuple[dict[str, AdapterRecord], dict[str, list[np.ndarray]]]:
    model = load_tiny(checkpoint)
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        async with running_engine(model, store.lower, max_num_batched_tokens=128) as engine:
            records = {
                name: (
                    await asyncio.to_thread(
                        store.register, Registration(name, Uri(str(directory / name))), probe=engine.probe
                    )
                ).record
                for name in names
            }
            asked = [EncodeRequest(id=name, inputs=TEXTS, adapter=records[name]) for name in names]
            outputs = await asyncio.gather(*map(engine.encode, asked))
            alone = [
                await engine.encode(EncodeRequest(id="alone", inputs=(text,), adapter=records[name]))
                for name in names
                for text in TEXTS
            ]
    together = [values for output in outputs for values in output.values]
    for one, same in zip(alone, together, strict=True):
        assert np.array_equal(one.values[0], same)
    assert all(record.effect for record in records.values())
    return records, {name: list(output.values) for name, output in zip(names, outputs, strict=True)}


def test_values_are_peft_s(found: Found) -> None:
    _, answers, expected = found
    for name, wanted in expected.items():
        for ours, theirs in zip(answers[name], wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


def test_records_say_what_a_task_does(found: Found) -> None:
    records, _, _ = found
    for name, record in records.items():
        assert record.kind is KINDS.get(name, TaskKind.CLASSIFY)


def test_methods_on_the_pooler_are_peft_s(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", seed=8)
    expected = {}
    for seed, (name, last) in enumerate(
        (("lora", 1), ("dora", 1), ("adalora", 1), ("vera", 1), ("ia3", 0), ("ia3", 1), ("vectors", 1))
    ):
        config = CONFIGS[name](["query", "pooler.dense"][:: 1 if last else -1])
        peft = make_peft(load_reference(checkpoint, config.task_type, seed), config, size=0.3)
        task = f"{name}-{last}"
        save_peft(peft, tmp_path / task)
        expected[task] = expected_of(peft, name)
    _, answers = asyncio.run(answer_all(tmp_path, checkpoint, list(expected)))
    for task, wanted in expected.items():
        for ours, theirs in zip(answers[task], wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE, err_msg=task)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_hidden_values_are_transformers_s_on_both_backends(
    tmp_path: Path, family: str, quantization: str
) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=3, auto="AutoModelForMaskedLM")
    transformers: Any = import_module("transformers")
    reference = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(False)
    model = load_tiny(checkpoint, quantization)

    async def encode(backend: Any) -> list[np.ndarray]:
        async with running_engine(model, max_num_batched_tokens=64, backend=backend) as engine:
            asked = EncodeRequest(id="a", inputs=TEXTS[:4], pooling=Pooling.ALL)
            return list((await engine.encode(asked)).values)

    ours, slow = asyncio.run(encode(None)), asyncio.run(encode(TorchBackend()))
    for ids, fast, plain in zip(TEXTS, ours, slow, strict=False):
        np.testing.assert_allclose(fast, plain, atol=TOLERANCE, rtol=TOLERANCE)
        if quantization == "none":
            with torch.no_grad():
                rows = reference(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
            np.testing.assert_allclose(fast, rows, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_pooler_is_kept_where_layers_are_quantized(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", seed=3)
    for _ in range(2):  # quantized, then from the cache
        pooler = load_tiny(checkpoint, "nf4").weights.outer["pooler"]
        expected = load_tiny(checkpoint).weights.outer["pooler"]
        assert torch.equal(torch.as_tensor(pooler.matrix), torch.as_tensor(expected.matrix))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_is_refused_where_positions_do_not_count_it(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=3)

    async def encode(padding_id: int) -> None:
        async with running_engine(load_tiny(checkpoint)) as engine:
            await engine.encode(EncodeRequest(id="a", inputs=((5, 6), (5, padding_id, 6))))

    if family == "bert":
        asyncio.run(encode(0))
        return
    with pytest.raises(FieldInvalidError, match=r"inputs\[1\]: has the token 1, which is padding"):
        asyncio.run(encode(1))


def test_pairs_have_types_of_tokens(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", seed=3)
    transformers: Any = import_module("transformers")
    reference = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(False)
    types = tuple(tuple(int(index >= len(text) // 2) for index in range(len(text))) for text in TEXTS)

    async def encode() -> list[np.ndarray]:
        async with running_engine(load_tiny(checkpoint)) as engine:
            asked = EncodeRequest(id="a", inputs=TEXTS, token_types=types, pooling=Pooling.ALL)
            return list((await engine.encode(asked)).values)

    for ids, own, ours in zip(TEXTS, types, asyncio.run(encode()), strict=True):
        with torch.no_grad():
            output = reference(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([own]))
        np.testing.assert_allclose(ours, output.last_hidden_state[0].numpy(), atol=TOLERANCE, rtol=TOLERANCE)
