"""Legal artifacts of odd make: tables and rows of tasks that read, ties by other names, front layers saved in part."""

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
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType
from safetensors.torch import load_file, save_file

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.heads import Pooling
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.errors import NumericalError
from manyhats.engine.request import EncodeRequest
from support.factories.tiny_encoders import AUTO, ENCODERS, LINEARS, make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE, linears_of, make_checkpoint
from support.harnesses.engine import Prompt, Runner, load_tiny, random_ids, read_lora, running_engine
from support.harnesses.reading import TOLERANCE
from support.oracles.classifiers import load_model
from support.oracles.peft import make_peft, save_peft
from support.oracles.transformers import full_logits, load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_TOKENS = TINY_VOCAB_SIZE + 5
TEXTS = [tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (1, 9, 33)]
OWN_TOKENS = (5, NUM_TOKENS - 1, 7, TINY_VOCAB_SIZE, NUM_TOKENS - 3, 9)
ROWS = sorted({*TEXTS[1][2:5], 9})
KINDS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.FEATURE_EXTRACTION)
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("embed_tokens", {}),
    "gpt2": ("wte", {"kv_heads": 4, "tie": True}),
    "mixtral": ("embed_tokens", {}),
    "bert": ("word_embeddings", {}),
    "modernbert": ("tok_embeddings", {}),
}
"""Family → its embedding, and fields of its config."""


def make_model(directory: Path, family: str) -> Path:
    if family in ENCODERS:
        return make_encoder(directory, family, seed=8, auto=AUTO.get(family, "AutoModel"))
    return make_checkpoint(directory, family, seed=8, **MODELS[family][1])


def configs_of(embedding: str, linears: list[str]) -> dict[str, tuple[dict[str, Any], int]]:
    """Name → fields of LoRA, and how many tokens its model has."""
    added = range(TINY_VOCAB_SIZE, NUM_TOKENS)
    return {
        "table": ({"target_modules": linears, "modules_to_save": [embedding]}, TINY_VOCAB_SIZE),
        "rows": ({"target_modules": linears, "trainable_token_indices": {embedding: ROWS}}, TINY_VOCAB_SIZE),
        "lora": ({"target_modules": [*linears, embedding]}, TINY_VOCAB_SIZE),
        "everywhere": ({"target_modules": "all-linear"}, TINY_VOCAB_SIZE),
        "larger": ({"target_modules": linears, "modules_to_save": [embedding]}, NUM_TOKENS),
        "added": ({"target_modules": linears, "trainable_token_indices": [*ROWS, *added]}, NUM_TOKENS),
    }


@torch.no_grad()
def values_of(peft: Any, texts: list[tuple[int, ...]]) -> list[np.ndarray]:
    """What PEFT makes of each text: rows of logits, or of hidden values."""
    values = []
    for ids in texts:
        output = peft(input_ids=torch.tensor([ids]))
        rows = getattr(output, "logits", None)
        rows = output.last_hidden_state if rows is None else rows
        values.append((rows if rows.dim() == 2 else rows[0]).numpy())
    return values


async def answers_of(directory: Path, checkpoint: Path, texts: Mapping[str, list[tuple[int, ...]]]) -> Any:
    """What the engine makes of each task's texts, all in one batch; hidden values of all rows where it has no head."""
    model = load_tiny(checkpoint)
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        records = {
            name: store.register(Registration(name, Uri(str(directory / name)))).record for name in texts
        }
        async with running_engine(model, store.lower, max_num_batched_tokens=96) as engine:
            asked = [
                EncodeRequest(
                    id=name,
                    inputs=tuple(texts[name]),
                    adapter=record,
                    pooling=Pooling.ALL if name.endswith("feature-extraction") else None,
                )
                for name, record in records.items()
            ]
            outputs = await asyncio.gather(*map(engine.encode, asked))
    return {name: output.values for name, output in zip(texts, outputs, strict=True)}


def assert_equal(ours: Mapping[str, Any], expected: Mapping[str, list[np.ndarray]]) -> None:
    for name, wanted in expected.items():
        for each, value in zip(ours[name], wanted, strict=True):
            np.testing.assert_allclose(each, value, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("family", MODELS)
def test_tasks_that_read_have_embeddings_of_their_own(tmp_path: Path, family: str) -> None:
    """Each by the path that its model has, without an output head, and with tokens of its own."""
    checkpoint = make_model(tmp_path / "model", family)
    linears = list(LINEARS[family]) if family in LINEARS else linears_of(family)
    texts: dict[str, list[tuple[int, ...]]] = {}
    expected = {}
    for kind in KINDS:
        for case, (fields, num_tokens) in configs_of(MODELS[family][0], linears).items():
            if case == "everywhere" and kind is TaskType.TOKEN_CLS:
                continue  # PEFT fails: the classifier is a linear too
            name = f"{case}-{kind.value.lower().replace('_', '-')}"
            base = load_model(checkpoint, kind, 3 if kind is not TaskType.FEATURE_EXTRACTION else 0)
            if num_tokens > TINY_VOCAB_SIZE:
                base.resize_token_embeddings(num_tokens, mean_resizing=False)
            peft = make_peft(base, LoraConfig(task_type=kind, r=4, **fields), size=0.1)
            save_peft(peft, tmp_path / name)
            texts[name] = [*TEXTS, *([OWN_TOKENS] if num_tokens > TINY_VOCAB_SIZE else [])]
            expected[name] = values_of(peft, texts[name])
    assert_equal(asyncio.run(answers_of(tmp_path, checkpoint, texts)), expected)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("bert", ["bert.pooler", "classifier"]),
        ("bert", ["pooler.dense"]),
        ("albert", ["albert.pooler"]),
        ("modernbert", ["head.dense"]),
        ("modernbert", ["head.norm", "classifier"]),
    ],
)
def test_what_is_in_front_of_a_classifier_is_saved_in_part_and_by_any_name(
    tmp_path: Path, family: str, names: list[str]
) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    base = load_model(checkpoint, TaskType.SEQ_CLS, 4)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, target_modules=list(LINEARS[family]), modules_to_save=names
    )
    peft = make_peft(base, config, size=0.1)
    save_peft(peft, tmp_path / "task")
    texts = {"task": TEXTS}
    assert_equal(
        asyncio.run(answers_of(tmp_path, checkpoint, texts)), {"task": values_of(peft, texts["task"])}
    )


TIES: Mapping[str, dict[str, Any]] = {
    "table": {"modules_to_save": ["{embedding}"]},
    "lora": {"target_modules": ["{embedding}", "{linear}"]},
    "head": {"modules_to_save": ["lm_head"]},
    "pattern": {"target_modules": r".*\.({linear}|{embedding})"},
}


@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize(
    ("family", "embedding", "fields"),
    [
        ("gpt2", "wte", {"kv_heads": 4, "tie": True}),
        ("falcon", "word_embeddings", {"tie": True}),
        ("llama", "embed_tokens", {"tie": True}),
    ],
)
def test_a_tie_is_kept_where_peft_knows_the_names(
    tmp_path: Path, family: str, embedding: str, fields: dict[str, Any], case: str
) -> None:
    """``ensure_weight_tying`` does nothing for an embedding that is not called ``embed_tokens``."""
    checkpoint = make_checkpoint(tmp_path / "model", family, seed=8, **fields)
    names = {"embedding": embedding, "linear": linears_of(family)[0]}
    options: dict[str, Any] = {"target_modules": linears_of(family)}
    for field, value in TIES[case].items():
        options[field] = (
            value.format(**names) if isinstance(value, str) else [each.format(**names) for each in value]
        )
    assert_logits_are_peft_s(tmp_path, checkpoint, LoraConfig(r=4, ensure_weight_tying=True, **options))


@pytest.mark.parametrize("family", ["gptj", "phi"])
def test_a_head_with_a_bias_is_adapted(tmp_path: Path, family: str) -> None:
    """PEFT saves that bias beside the head's weight."""
    fields: dict[str, Any] = {"kv_heads": 4} if family == "gptj" else {}
    checkpoint = make_checkpoint(tmp_path / "model", family, seed=8, **fields)
    assert_logits_are_peft_s(tmp_path, checkpoint, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def assert_logits_are_peft_s(directory: Path, checkpoint: Path, config: LoraConfig) -> None:
    """As PEFT has them of the saved file, at every position."""
    reference = load_transformers(checkpoint)
    config.task_type = "CAUSAL_LM"
    save_peft(make_peft(reference, copy.deepcopy(config)), directory / "task")
    peft = _loaded(reference, directory / "task")
    model = load_tiny(checkpoint)
    runner = Runner(model, adapters={1: read_lora(directory / "task", model.description)})
    (ran,) = runner.run([Prompt(TEXTS[2], slot=1, new_tokens=1)], all_logits=True)
    torch.testing.assert_close(
        ran.stacked[: len(TEXTS[2])], full_logits(peft, TEXTS[2]), atol=TOLERANCE, rtol=TOLERANCE
    )


def _loaded(reference: Any, directory: Path) -> Any:
    peft: Any = PeftModel.from_pretrained(copy.deepcopy(reference), str(directory))
    peft.train(False)
    return peft


def test_a_layer_that_the_file_should_have_is_not_replaced_by_the_base_s(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", "bert", seed=8)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query"], modules_to_save=["pooler"])
    peft = make_peft(load_model(checkpoint, TaskType.SEQ_CLS, 2), config)
    directory = save_peft(peft, tmp_path / "task")
    description = load_tiny(checkpoint).description
    assert read_lora(directory, description).head is not None
    _change(directory, {}, without="pooler")
    with pytest.raises(AdapterInvalidError, match=r"modules_to_save: names pooler, but .*pooler\.dense"):
        read_lora(directory, description)


def test_a_pooler_is_not_saved_and_adapted_at_once(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", "bert", seed=8)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "pooler.dense"])
    peft = make_peft(load_model(checkpoint, TaskType.SEQ_CLS, 2), config)
    directory = save_peft(peft, tmp_path / "task")
    description = load_tiny(checkpoint).description
    assert read_lora(directory, description).head is not None
    name = "base_model.model.bert.pooler.dense"
    _change(directory, {f"{name}.weight": torch.eye(64), f"{name}.bias": torch.ones(64)})
    with pytest.raises(AdapterInvalidError, match="trained as a whole, and the adapter acts on it besides"):
        read_lora(directory, description)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_spans_are_refused_where_transformers_leaves_out_the_base(tmp_path: Path, method: str) -> None:
    """Its class has other paths than the checkpoint, whose weights it does not find."""
    checkpoint = make_checkpoint(tmp_path / "model", "llama", seed=8)
    kind = TaskType.QUESTION_ANS
    config = {
        "lora": LoraConfig(task_type=kind, target_modules=["q_proj"]),
        "prefix": PrefixTuningConfig(task_type=kind, num_virtual_tokens=3),
        "prompt": PromptTuningConfig(task_type=kind, num_virtual_tokens=3),
    }[method]
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(checkpoint)
    whole: Any = load_transformers(checkpoint)
    own = whole.get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, own)
    directory = save_peft(make_peft(model, config), tmp_path / "task")
    with pytest.raises(AdapterUnsupportedError, match="QUESTION_ANS is not served on llama: transformers'"):
        read_lora(directory, load_tiny(checkpoint).description)


def _change(directory: Path, tensors: Mapping[str, torch.Tensor], *, without: str = "") -> None:
    """Leave out and add tensors of an artifact."""
    path = directory / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not without or without not in name}
    save_file({**kept, **tensors}, path)


@pytest.mark.parametrize(
    ("family", "kind", "lost"),
    [
        ("bert", TaskType.SEQ_CLS, "classifier.bias"),
        ("bert", TaskType.TOKEN_CLS, "classifier.bias"),
        ("roberta", TaskType.SEQ_CLS, "classifier.dense.bias"),
        ("modernbert", TaskType.TOKEN_CLS, "classifier.bias"),
        ("llama", TaskType.TOKEN_CLS, "score.bias"),
    ],
)
def test_a_head_that_lost_its_bias_is_refused(tmp_path: Path, family: str, kind: TaskType, lost: str) -> None:
    """PEFT would leave the one there that the model began with, at random."""
    if family in ENCODERS:
        checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    else:
        checkpoint = make_checkpoint(tmp_path / "model", family, seed=8)
    linear = list(LINEARS.get(family, ["q_proj"]))[:1]
    peft = make_peft(load_model(checkpoint, kind, 3), LoraConfig(task_type=kind, target_modules=linear))
    directory = save_peft(peft, tmp_path / "task")
    description = load_tiny(checkpoint).description
    assert read_lora(directory, description).head is not None
    _change(directory, {}, without=lost)
    with pytest.raises(AdapterInvalidError, match=f"{lost}: is missing beside"):
        read_lora(directory, description)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_span_has_two_ends(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    config = LoraConfig(task_type=TaskType.TOKEN_CLS, target_modules=list(LINEARS[family][:1]))
    directory = save_peft(make_peft(load_model(checkpoint, TaskType.TOKEN_CLS, 3), config), tmp_path / "task")
    tensors = load_file(directory / "adapter_model.safetensors")
    layer = "base_model.model.qa_outputs" if family == "bert" else "base_model.model.classifier"
    head = {
        f"{layer}.{part}": tensors[f"base_model.model.classifier.{part}"].clone()
        for part in ("weight", "bias")
    }
    _change(directory, head, without="classifier")
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"TOKEN_CLS"', '"QUESTION_ANS"'))
    with pytest.raises(AdapterInvalidError, match="has 3 outputs; a span has 2, its start and its end"):
        read_lora(directory, load_tiny(checkpoint).description)


def test_outputs_that_overflow_are_an_error_of_their_task_alone(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", "bert", seed=8)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query"])
    peft = make_peft(load_model(checkpoint, TaskType.SEQ_CLS, 3), config, size=0.1)
    for name in ("sound", "huge"):
        save_peft(peft, tmp_path / name)
    weight = {"base_model.model.classifier.weight": torch.full((3, 64), 3e38)}
    _change(tmp_path / "huge", weight, without="classifier.weight")
    model = load_tiny(checkpoint)

    async def encode() -> list[Any]:
        with closing(open_store(tmp_path / "store", model.description, [tmp_path])) as store:
            records = [
                store.register(Registration(name, Uri(str(tmp_path / name)))).record
                for name in ("sound", "huge")
            ]
            async with running_engine(model, store.lower) as engine:
                asked = [
                    EncodeRequest(id="a", inputs=tuple(TEXTS), adapter=record)
                    for record in (*records, *records)
                ]
                return await asyncio.gather(*map(engine.encode, asked), return_exceptions=True)

    sound, huge, again, _ = asyncio.run(encode())
    assert isinstance(huge, NumericalError)
    assert "the outputs of the task's head are not finite" in str(huge)
    expected = values_of(peft, TEXTS)
    assert_equal({"first": sound.values, "last": again.values}, {"first": expected, "last": expected})
