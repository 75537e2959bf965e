"""Classes of texts and of tokens, and embeddings, by task: in one batch, beside generation, against PEFT's models."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling
from manyhats.engine.request import EncodeRequest
from support.factories.tiny_models import TINY_VOCAB_SIZE, linears_of, make_checkpoint
from support.harnesses.engine import load_tiny, random_ids, running_engine
from support.harnesses.reading import (
    CONFIGS,
    PROMPTS,
    TOLERANCE,
    Values,
    answer_all,
    assert_kinds_are_right,
    assert_values_are,
    expected_of,
)

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

PAD = 2
TEXTS = [random_ids(length, length, TINY_VOCAB_SIZE) for length in (1, 9, 40, 70)]
TEXTS += [[*random_ids(3, 12, TINY_VOCAB_SIZE), PAD, PAD], [PAD, PAD]]
NAMES = ("lora", "ia3", "prefix", "prompt", "p-tuning", "tokens")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"kv_heads": 4},
    "opt": {"kv_heads": 4, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
}
Found = tuple[dict[str, AdapterRecord], Values, Values]


def names_of(family: str) -> list[str]:
    """PEFT has no prompts where the embedding is narrower than the stream; OPT has no classes of tokens."""
    return [name for name in NAMES if family != "opt" or name not in (*PROMPTS, "tokens")]


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Records, what the engine found of every text in one batch over all tasks, and what PEFT finds."""
    directory, family = tmp_path_factory.mktemp("heads"), request.param
    checkpoint = make_checkpoint(directory / "model", family, seed=8, **FAMILIES[family])
    expected = {}
    for name in names_of(family):
        config = CONFIGS[name](linears_of(family))
        expected[name] = expected_of(checkpoint, name, config, directory / name, TEXTS)
    records, answers = asyncio.run(answer_all(directory, checkpoint, expected, TEXTS))
    return records, answers, expected


def test_logits_are_peft_s(found: Found) -> None:
    _, answers, expected = found
    assert_values_are(answers, expected)


def test_records_say_what_a_task_does(found: Found) -> None:
    assert_kinds_are_right(found[0])


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
