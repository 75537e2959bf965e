"""Tasks that read texts: what PEFT makes of a text with each method and head, and what the engine does."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
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
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.request import EncodeRequest
from support.harnesses.backends import assert_alike
from support.harnesses.engine import collect, load_tiny, make_request, running_engine
from support.oracles.peft import make_peft, save_peft

TOLERANCE = 1e-4
_AUTO = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_TEXTS, _TOKENS, _VIRTUAL = {"task_type": TaskType.SEQ_CLS}, {"task_type": TaskType.TOKEN_CLS}, 5
CONFIGS: Mapping[str, Any] = {
    "lora": lambda names: LoraConfig(**_TEXTS, r=4, target_modules=names),
    "dora": lambda names: LoraConfig(**_TEXTS, r=4, use_dora=True, target_modules=names),
    "adalora": lambda names: AdaLoraConfig(**_TEXTS, init_r=4, total_step=9, target_modules=names),
    "vera": lambda names: VeraConfig(**_TEXTS, r=8, target_modules=names),
    "ia3": lambda names: IA3Config(**_TEXTS, target_modules=names, feedforward_modules=names[-1:]),
    "prefix": lambda _: PrefixTuningConfig(**_TEXTS, num_virtual_tokens=_VIRTUAL),
    "prompt": lambda _: PromptTuningConfig(**_TEXTS, num_virtual_tokens=_VIRTUAL),
    "p-tuning": lambda _: PromptEncoderConfig(**_TEXTS, num_virtual_tokens=_VIRTUAL, encoder_hidden_size=12),
    "tokens": lambda names: LoraConfig(**_TOKENS, r=4, target_modules=names),
    "prompted-tokens": lambda _: PromptTuningConfig(**_TOKENS, num_virtual_tokens=_VIRTUAL),
    "span": lambda names: LoraConfig(task_type=TaskType.QUESTION_ANS, r=4, target_modules=names),
    "vectors": lambda names: LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=names),
}
"""Name of a task → from linears to PEFT's config."""
PROMPTS = ("prompt", "p-tuning", "prompted-tokens")
KINDS = {
    "tokens": TaskKind.CLASSIFY_TOKENS,
    "prompted-tokens": TaskKind.CLASSIFY_TOKENS,
    "span": TaskKind.SPAN,
    "vectors": TaskKind.EMBED,
}
"""What a task does, if not classify texts."""
_NUM_LABELS = {"ia3": 7, "dora": 3, "prefix": 3, "prompt": 4, "p-tuning": 1, "tokens": 5}
Values = dict[str, list[np.ndarray]]


def expected_of(
    checkpoint: Path, name: str, config: Any, directory: Path, texts: Seq[Seq[int]], size: float = 0.3
) -> list[np.ndarray]:
    """Saves a random adapter, and says what PEFT makes of each text with it: rows of outputs.

    Args:
        checkpoint: of the base.
        name: of the task in ``CONFIGS``.
        config: PEFT's.
        directory: of the adapter.
        texts: token ids.
        size: of the adapter's random numbers.
    """
    peft = make_peft(copy.deepcopy(_load_reference(checkpoint, config.task_type, name)), config, size=size)
    save_peft(peft, directory)
    return [_value_of(peft, name, ids) for ids in texts]


def _load_reference(directory: Path, task_type: str, name: str) -> Any:
    transformers: Any = import_module("transformers")
    has_labels = task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
    options = {"num_labels": _NUM_LABELS.get(name, 2)} if has_labels else {}
    with torch.random.fork_rng():
        torch.manual_seed(list(CONFIGS).index(name))
        model = getattr(transformers, _AUTO[task_type]).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", **options
        )
    model.train(False)
    return model


@torch.no_grad()
def _value_of(peft: Any, name: str, ids: Seq[int]) -> np.ndarray:
    output = peft(input_ids=torch.tensor([ids]))
    if name == "vectors":
        value = output.last_hidden_state[0].mean(0, keepdim=True)
    elif name == "span":
        value = torch.stack((output.start_logits[0], output.end_logits[0]), dim=1)
    else:
        value = output.logits if output.logits.dim() == 2 else output.logits[0, -len(ids) :]
    return value.numpy()


async def answer_all(
    directory: Path, checkpoint: Path, names: Collection[str], texts: Iterable[Seq[int]]
) -> tuple[dict[str, AdapterRecord], Values]:
    """Records of the adapters in ``directory``, and what the engine finds of every text, all tasks in one batch.

    Each text alone, on its task, has the same bits; if the base generates, it does so beside them.
    """
    model, texts = load_tiny(checkpoint), tuple(map(tuple, texts))
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        async with running_engine(model, store.lower, max_num_batched_tokens=128) as engine:
            records = {}
            for name in names:
                registration = Registration(name, Uri(str(directory / name)))
                found = await asyncio.to_thread(store.register, registration, probe=engine.probe)
                records[name] = found.record
            asked = [EncodeRequest(id=name, inputs=texts, adapter=records[name]) for name in names]
            beside = (
                []
                if model.architecture.head is None
                else [collect(engine, make_request(texts[1], new_tokens=20))]
            )
            outputs = (await asyncio.gather(*beside, *map(engine.encode, asked)))[len(beside) :]
            alone = [
                await engine.encode(EncodeRequest(id="alone", inputs=(text,), adapter=records[name]))
                for name in names
                for text in texts
            ]
    together = [values for output in outputs for values in output.values]
    for one, same in zip(alone, together, strict=True):
        assert_alike(one.values[0], same)
    assert [output.usage.prompt_tokens for output in outputs] == [sum(map(len, texts))] * len(names)
    assert all(record.effect for record in records.values())
    return records, {name: list(output.values) for name, output in zip(names, outputs, strict=True)}


def assert_values_are(answers: Values, expected: Values) -> None:
    """Within the tolerance, task by task and text by text."""
    for name, wanted in expected.items():
        for ours, theirs in zip(answers[name], wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


def assert_kinds_are_right(records: Mapping[str, AdapterRecord]) -> None:
    """Each task does what its name says."""
    for name, record in records.items():
        assert record.kind is KINDS.get(name, TaskKind.CLASSIFY), name
