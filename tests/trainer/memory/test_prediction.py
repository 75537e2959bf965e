"""Predicted memory: counts that are exact, and activations against those of the decoder itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.adapters.heads import TaskKind
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Weights
from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.batch import ReadRow, collate, collate_read
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.errors import BaseError, DataError, SettingError
from manyhats.trainer.memory import NO_DATA, MemoryPrediction, predict_memory
from manyhats.trainer.memory.activations import (
    Step,
    head_bytes,
    inputs_kept,
    layer_backward,
    layer_kept,
    layers_kept,
    of_largest_layer,
)
from manyhats.trainer.memory.adapter_size import adapter_size
from manyhats.trainer.memory.batch_shape import BatchShape, behind, longest_rows
from manyhats.trainer.memory.prediction import Machine, TaskSize, predict
from manyhats.trainer.memory.runtime import machine_of, resident_bytes
from manyhats.trainer.memory.shape import BaseShape, read_shape
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.model.head_loss import HeadLoss
from manyhats.trainer.run.gradients import LoweredOnce
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from manyhats.trainer.settings.settings import ModelSettings, OptimizationSettings, TrainSettings
from manyhats.trainer.settings.settings_file import make_settings
from support.factories.head_tasks import head_rows
from support.factories.head_tasks import write_rows as write_head_rows
from support.factories.tiny_encoders import AUTO, ENCODERS, make_encoder
from support.factories.tiny_models import make_checkpoint
from support.factories.trainables import ALL_CASES
from support.harnesses.live_bytes import LiveBytes
from support.harnesses.training import make_rows

LLAMA_33B: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 6656,
    "num_hidden_layers": 60,
    "num_attention_heads": 52,
    "num_key_value_heads": 52,
    "intermediate_size": 17920,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GB = 10**9
VOCAB_SIZE = 2048


@cache
def checkpoint(family: str = "llama") -> Path:
    """A model whose activations outweigh the few that do not grow with it."""
    return make_checkpoint(
        Path(mkdtemp(prefix="manyhats-test-")) / family,
        family,
        hidden_size=256,
        num_layers=3,
        intermediate_size=704,
        vocab_size=VOCAB_SIZE,
    )


@cache
def loaded(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, BaseShape]:
    directory = checkpoint(family)
    model = load_model(str(directory), quantization="nf4", dtype=dtype, home=directory.parent / "home")
    return model, read_shape(str(directory))


def settings_of(method: str = "lora", **values: Any) -> TrainSettings:
    return make_settings(
        {
            "method": method,
            "task": "t",
            "data": NO_DATA,
            "model": str(checkpoint()),
            "device": "cpu",
            **values,
        }
    )


def predicted(method: str = "lora", **values: Any) -> MemoryPrediction:
    return predict_memory([settings_of(method, **values)])


def write_config(directory: Path, content: Mapping[str, Any]) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(content))
    return path


# What is exact


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "mixtral", "bert", "albert", "modernbert"])
def test_the_base_is_counted_exactly_without_its_weights(family: str) -> None:
    model, shape = encoder(family) if family in ENCODERS else loaded(family)
    linears = [
        linear.matrix
        for block in model.weights.sets
        for name, linear in block.linears.items()
        if name != "router"
    ]
    assert shape.num_linear_parameters == sum(weight.shape[0] * weight.shape[1] for weight in linears)
    num_bytes = sum(weight.num_bytes for weight in linears if isinstance(weight, Nf4Weight))
    assert shape.nf4_bytes == pytest.approx(num_bytes, rel=1e-3)
    weights = model.weights
    head = weights.outer.get("lm_head")
    tables = weights.embedding.numel() + (0 if head is None else head.out_features * head.in_features)
    assert shape.num_table_parameters == tables
    routers = 3 * 4 * 256 if family == "mixtral" else 0
    assert shape.num_other_parameters == sum(tensor.numel() for tensor in others_of(weights)) + routers


def others_of(weights: Weights) -> Iterator[Tensor]:
    """Norms, biases, positions, types, and linears outside the layers but the head."""
    norms = [*weights.norms(), *filter(None, [weights.pooler_norm])]
    outer = [linear for name, linear in weights.outer.items() if name != "lm_head"]
    maybe = [
        *(tensor for norm in norms for tensor in (norm.weight, norm.bias)),
        *(linear.bias for linear in (*weights.linears(), *outer)),
        *(linear.matrix for linear in outer),
        weights.positions,
        weights.token_types,
    ]
    yield from (tensor for tensor in maybe if isinstance(tensor, Tensor))


@pytest.mark.parametrize("name", ALL_CASES)
def test_trained_parameters_are_counted_exactly(name: str) -> None:
    model, shape = loaded()
    adapter = make_adapter(ALL_CASES[name], "t", model, seed=0)
    size = adapter_size(ALL_CASES[name], shape.family)
    assert size.num_trained == sum(parameter.numel() for parameter in adapter.parameters.values())
    prefix = adapter.lowered().prefix
    assert size.num_virtual_tokens == (0 if prefix is None else prefix.num_virtual_tokens)


def test_modules_of_several_linears_are_counted_once() -> None:
    model, shape = loaded("phi3")
    settings = LoraSettings(target_modules=("qkv_proj", "down_proj"))
    adapter = make_adapter(settings, "t", model, seed=0)
    size = adapter_size(settings, shape.family)
    assert size.num_trained == sum(parameter.numel() for parameter in adapter.parameters.values())
    assert size.ranks.keys() == {"q_proj", "k_proj", "v_proj", "down_proj"}


# Activations


METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(),
    "lora with dropout": LoraSettings(dropout=0.1),
    "lora of some": LoraSettings(target_modules=("q_proj", "v_proj")),
    "dora": LoraSettings(use_dora=True),
    "ia3": Ia3Settings(),
    "seq": BottleneckSettings(),
    "double_seq": BottleneckSettings(variant="double_seq"),
    "parallel": BottleneckSettings(variant="parallel"),
    "prefix": PrefixSettings(),
    "prompt": PromptSettings(),
    "ptuning": PTuningSettings(),
}
BATCHES = {"equal": ((96,) * 6, 0), "ragged": ((96, 70, 40, 60, 96, 50), 0), "shared": ((96, 70, 40, 60), 30)}


def activation_cases() -> Iterator[Any]:
    """All combinations; of each method with each batch, one in turn is not slow."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    ways = list(product({"checkpoints": True, "keeps all": False}.items(), dtypes.items()))
    for number, (method, rows) in enumerate(product(METHODS, BATCHES)):
        for index, ((checkpoints, is_checkpointed), (name, dtype)) in enumerate(ways):
            marks = () if index == number % len(ways) else pytest.mark.slow
            case = f"{method}-{rows}-{checkpoints}-{name}"
            yield pytest.param(method, rows, is_checkpointed, dtype, id=case, marks=marks)


@pytest.mark.parametrize(("method", "rows", "checkpoints", "dtype"), list(activation_cases()))
def test_activations_are_those_of_the_decoder(
    method: str, rows: str, checkpoints: bool, dtype: torch.dtype
) -> None:
    check_activations(*loaded(dtype=dtype), method, rows, checkpoints, dtype)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoints", "keeps all"])
@pytest.mark.parametrize(("method", "rows"), [("lora of some", "equal"), ("prefix", "ragged")])
def test_activations_of_experts_are_those_of_the_decoder(
    family: str, method: str, rows: str, checkpoints: bool, dtype: torch.dtype
) -> None:
    check_activations(*loaded(family, dtype), method, rows, checkpoints, dtype)


def check_activations(
    model: LoadedModel, shape: BaseShape, method: str, rows: str, checkpoints: bool, dtype: torch.dtype
) -> None:
    decoder = TrainingDecoder(
        model, dtype=dtype, gradient_checkpointing=checkpoints, device=torch.device("cpu")
    )
    adapter = make_adapter(METHODS[method], "t", model, seed=0)
    lengths, num_shared = BATCHES[rows]
    batch = collate(make_rows(lengths, num_shared=num_shared, vocab_size=VOCAB_SIZE))
    lowered = LoweredOnce(adapter.lowered())
    with LiveBytes() as live:
        loss = decoder.loss(batch, lowered.adapter, dropout=adapter.dropout)
        kept = live.now
        live.peak = live.now
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = live.now
    segments = batch.segments[1:] if batch.num_shared else batch.segments
    size = BatchShape(
        num_tokens=len(batch.token_ids),
        num_rows=len(segments),
        longest=max(segments),
        num_shared=batch.num_shared,
        num_targets=len(batch.targets),
    )
    step = Step(shape.architecture, adapter_size(METHODS[method], shape.family), size, dtype.itemsize, True)
    inputs = inputs_kept(step, reads_one=False)
    of_layers = 0 if checkpoints else layers_kept(step)
    assert inputs + of_layers == pytest.approx(kept, rel=0.2)
    step = of_largest_layer(step)
    backward = inputs + (of_layers or layer_kept(step)) + layer_backward(step)
    assert backward == pytest.approx(live.peak - gradients, rel=0.3)


@cache
def encoder(family: str = "bert") -> tuple[LoadedModel, BaseShape]:
    """An encoder whose activations outweigh the few that do not grow with it."""
    directory = Path(mkdtemp(prefix="manyhats-test-"))
    make_encoder(
        directory / "model",
        family,
        auto=AUTO.get(family, "AutoModel"),
        hidden_size=256,
        num_hidden_layers=3,
        intermediate_size=1024,
        vocab_size=VOCAB_SIZE,
    )
    model = load_model(
        str(directory / "model"), quantization="nf4", dtype=torch.float32, home=directory / "home"
    )
    return model, read_shape(str(directory / "model"))


CLASSES = HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.CROSS_ENTROPY, classes=("a", "b", "c"))


def encoder_cases() -> Iterator[Any]:
    """Every method on BERT; on others those that differ there."""
    yield from (("bert", method) for method in METHODS)
    yield from (("albert", method) for method in ("lora", "dora", "ia3", "double_seq", "prompt"))
    yield from (("modernbert mean", method) for method in ("lora", "dora", "ia3", "prompt"))


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(("family", "method"), list(encoder_cases()))
def test_activations_of_an_encoder_are_those_of_the_decoder(
    family: str, method: str, checkpoints: bool
) -> None:
    model, shape = encoder(family)
    decoder = TrainingDecoder(
        model, dtype=torch.float32, gradient_checkpointing=checkpoints, device=torch.device("cpu")
    )
    settings = METHODS[method]
    adapter = make_adapter(settings, "t", model, seed=0, head=CLASSES)
    texts = [tuple(range(3, 3 + length)) for length in (96, 70, 40, 60, 96, 50)]
    batch = collate_read([ReadRow((ReadText(text),), (1.0,), 1) for text in texts])
    lowered = LoweredOnce(adapter.lowered())
    losses = HeadLoss(decoder, CLASSES)
    with LiveBytes() as live:
        loss = losses.loss(batch, lowered.adapter, dropout=adapter.dropout)
        kept = live.now
        live.peak = live.now
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = live.now
    adapted = adapter_size(settings, shape.family, CLASSES)
    assert adapted.num_trained == sum(parameter.numel() for parameter in adapter.parameters.values())
    size = BatchShape(num_tokens=sum(map(len, texts)), num_rows=6, longest=96, num_targets=6)
    size = behind(size, adapted.num_in_layers)
    step = of_largest_layer(Step(shape.architecture, adapted, size, 4, True, reads=True))
    inputs = inputs_kept(step, reads_one=family != "modernbert mean")
    of_layers = 0 if checkpoints else layers_kept(step)
    assert inputs + of_layers == pytest.approx(kept, rel=0.2)
    backward = inputs + (of_layers or layer_kept(step)) + layer_backward(step)
    assert backward == pytest.approx(live.peak - gradients, rel=0.3)


def test_the_memory_of_heads_is_predicted(tmp_path: Path) -> None:
    data = write_head_rows(head_rows("classification", 20, 1), tmp_path / "rows.jsonl")
    _, shape = encoder()
    values: dict[str, Any] = {"model": shape.name, "data": str(data), "batch_size": 4, "shuffle": False}
    task = predicted("lora", head="classification", **values).tasks[0]
    assert (task.batch.num_rows, task.adapter.num_trained) == (
        4,
        adapter_size(LoraSettings(), shape.family, CLASSES).num_trained,
    )
    prompted = predicted("prompt", head="classification", num_virtual_tokens=9, **values).tasks[0]
    assert prompted.batch.longest == task.batch.longest + 9
    assert prompted.batch.num_tokens == task.batch.num_tokens + 4 * 9
    notes = predicted("lora", head="tokens", model=shape.name).notes
    assert "no data is given" in notes[0]
    assert "held-out rows are read by the engine" in notes[-1]
    with pytest.raises(BaseError, match="bert is an encoder, which continues no text"):
        predicted("lora", **values)


def test_the_head_holds_some_rows_of_logits_only() -> None:
    _, shape = loaded()
    adapter = adapter_size(LoraSettings(), shape.family)

    def of(num_targets: int, adapter: Any = adapter) -> int:
        batch = BatchShape(num_tokens=num_targets, num_rows=1, longest=num_targets, num_targets=num_targets)
        return head_bytes(Step(shape.architecture, adapter, batch, 4, True))

    limit = 2**24 // VOCAB_SIZE
    assert of(100) == 100 * (4 * VOCAB_SIZE + 12 * 256)
    assert of(2 * limit) == limit * (2 * 4 * VOCAB_SIZE + 2 * 12 * 256)
    assert of(3 * limit) - of(2 * limit) == 12 * 256 * limit
    on_head = adapter_size(LoraSettings(target_modules=("lm_head",)), shape.family)
    assert of(100, on_head) - of(100) == 2 * 4 * 100 * VOCAB_SIZE


# Predictions


def test_33_billion_parameters_fit_a_device_of_24_gb(tmp_path: Path) -> None:
    settings = make_settings(
        {
            "method": "qlora",
            "rank": 64,
            "task": "t",
            "data": NO_DATA,
            "model": str(write_config(tmp_path, LLAMA_33B)),
            "device": "cuda",
            "max_length": 512,
            "batch_size": 1,
            "optimizer": "paged_adamw_8bit",
        }
    )
    prediction = predict_memory([settings])
    assert prediction.num_parameters == pytest.approx(32.5e9, rel=0.01)
    assert prediction.tasks[0].adapter.num_trained == 64 * 60 * (4 * 2 * 6656 + 3 * (6656 + 17920))
    assert prediction.device == "cuda"
    assert prediction.parts["base: linears"] == pytest.approx(16.56 * GB, rel=0.01)
    assert 20 * GB < prediction.total < 24 * GB


@pytest.mark.parametrize(
    "more",
    [
        {"rank": 64},
        {"max_length": 400},
        {"batch_size": 64},
        {"quantization": "none", "dtype": "float32"},
        {"gradient_checkpointing": False},
        {"target_modules": ["q_proj", "lm_head"], "rank": 64},
    ],
    ids=str,
)
def test_more_work_takes_more_memory(more: dict[str, Any]) -> None:
    small = {"quantization": "nf4", "max_length": 200, "batch_size": 16, "dtype": "bfloat16", "rank": 4}
    before, after = predicted(**small), predicted(**{**small, **more})
    runtime = (before.parts["runtime"], after.parts["runtime"])
    assert after.total - runtime[1] > before.total - runtime[0]


def test_the_base_is_as_a_server_holds_it_unless_told(tmp_path: Path) -> None:
    """NF4 from 100 million parameters, or if it is stored so."""

    def of(method: str, **config: Any) -> tuple[int, int]:
        model = str(write_config(tmp_path, {**LLAMA_33B, **config}))
        base = predicted(method, model=model, max_length=100, device="cuda").parts["base: linears"]
        return base, read_shape(model).nf4_bytes

    assert of("prefix")[0] == of("prefix")[1]
    assert of("lora")[0] > 3 * of("lora")[1]
    small = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    assert of("prefix", **small)[0] > 3 * of("prefix", **small)[1]
    assert of("qlora", **small)[0] == of("qlora", **small)[1]
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    stored = {**stored, "bnb_4bit_use_double_quant": True}
    assert of("prefix", **small, quantization_config=stored)[0] == of("prefix", **small)[1]


def test_an_optimizer_of_8_bits_takes_a_quarter() -> None:
    full = predicted(max_length=100, device="cuda").parts["optimizer"]
    assert predicted(max_length=100, device="cuda", optimizer="adamw_8bit").parts["optimizer"] == (
        pytest.approx(full / 4, rel=0.02)
    )
    assert "optimizer" not in predicted(max_length=100, device="cuda", optimizer="paged_adamw_8bit").parts


def test_several_tasks_share_the_base_and_take_turns() -> None:
    tasks = [settings_of("qlora", max_length=300), settings_of("prompt", max_length=300)]
    _, shape = loaded()
    machine = Machine(device="cpu", element_bytes=4, runtime_bytes=0)
    sizes = [
        TaskSize(each, adapter_size(each.adapter, shape.family), longest_rows(each.optimization, 300))
        for each in tasks
    ]
    alone = [predict([size], shape, machine) for size in sizes]
    together = predict(sizes, shape, machine)
    base = sum(size for name, size in together.parts.items() if name.startswith("base"))
    own = [8 * size.adapter.num_trained + 4 * size.adapter.num_trained for size in sizes]
    assert max(each.total for each in alone) < together.total
    assert together.total <= max(each.total - mine for each, mine in zip(alone, own, strict=True)) + sum(own)
    assert base == sum(size for name, size in alone[0].parts.items() if name.startswith("base"))


def test_the_largest_batch_of_the_data_is_found(tmp_path: Path) -> None:
    lengths = [4, 5, 40, 8, 7, 6, 38, 9]
    rows = [{"prompt": "x" * (length - 3), "completion": "yz"} for length in lengths]  # and the end
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = predicted(data=str(data), batch_size=2, shuffle=False).tasks[0].batch
    assert (batch.num_rows, batch.longest + batch.num_shared) == (2, 40)
    assert batch.num_targets == 2 * 3
    assert batch.data_bytes == 5 * sum(lengths) + 20 * len(lengths)
    packed = predicted(data=str(data), batch_tokens=1000, shuffle=False).tasks[0].batch
    assert packed.num_rows == 8
    assert packed.num_tokens - packed.num_shared == sum(lengths) - 8 * packed.num_shared


def test_without_data_rows_are_as_long_as_they_may_be() -> None:
    prediction = predicted("prefix", num_virtual_tokens=12, batch_size=4)
    assert (prediction.tasks[0].batch.num_rows, prediction.tasks[0].batch.longest) == (4, 500)
    assert "no data is given" in prediction.notes[0]
    packed = predicted(max_length=100, batch_tokens=350).tasks[0].batch
    assert (packed.num_rows, packed.num_tokens) == (3, 300)


def test_labels_are_said_to_come_on_top(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", "a")
    assert "labels are scored" in predicted(labels=["a"], eval=held_out, max_length=50).notes[-1]


def write_rows(path: Path, *completions: str) -> str:
    path.write_text("".join(json.dumps({"prompt": "p", "completion": each}) + "\n" for each in completions))
    return str(path)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"eval": "none.jsonl"}, DataError, "none.jsonl: cannot be read"),
        ({"labels": ["a", "b"]}, DataError, "its completion 'c' is not one of the 2 labels"),
        ({"labels": ["a", "c", "x" * 600]}, DataError, "no room for the longest label"),
        ({"labels": ["a", "a"]}, SettingError, "labels: 'a' appears twice"),
    ],
)
def test_evaluation_data_that_cannot_be_used_is_refused(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    train = write_rows(tmp_path / "train.jsonl", "a", "b")
    held_out = write_rows(tmp_path / "eval.jsonl", "a", "c")
    predicted(data=train, eval=held_out)
    with pytest.raises(error, match=message):
        predicted(**{"data": train, "eval": held_out, **values})


@pytest.mark.parametrize("name", ["data", "eval"])
def test_data_that_is_not_counted_must_be_there(tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = {"model": str(write_config(tmp_path, LLAMA_33B)), "max_length": 100}
    there = write_rows(tmp_path / "rows.jsonl", "a")
    assert predicted(**values, **{name: there}).tasks[0].batch.longest == 100
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        predicted(**values, **{name: "none.jsonl"})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model": "nowhere"}, ModelError, "nowhere"),
        ({"target_modules": ["nothing"]}, SettingError, "target_modules: 'nothing' is not a linear"),
        ({"max_length": 513}, SettingError, "max_length: the base has room for 512"),
        ({"data": "none.jsonl"}, DataError, "none.jsonl"),
    ],
)
def test_what_cannot_be_trained_cannot_be_predicted(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        predicted(**values)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        (
            "bottleneck",
            {"reduction_factor": 257},
            "reduction_factor: is 257, above the base's hidden size 256",
        ),
        ("lora", {"rank": 257}, "rank: is 257; the limit is 256"),
        ("lora", {"rank_pattern": {"q_proj": 300}}, "rank_pattern: is 300; the limit is 256"),
        (
            "lora",
            {"rank_pattern": {"nonsense": 3}},
            "rank_pattern: 'nonsense' matches none of the trained modules",
        ),
        (
            "dora",
            {"alpha_pattern": {"lm_head": 3}},
            "alpha_pattern: 'lm_head' matches none of the trained modules",
        ),
        (
            "lora",
            {"rank_pattern": {"(?!v).*": 3}},
            "rank_pattern: the key .* uses a lookahead, which is not supported in a pattern",
        ),
        ("prompt", {"num_virtual_tokens": 4097}, "num_virtual_tokens: is 4097; the limit is 4096"),
        ("prefix", {"num_virtual_tokens": 511}, "num_virtual_tokens: leaves no room for a row"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused(method: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        predicted(method, **values)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"model_type": "t5", "d_model": 512})
    with pytest.raises(ModelError, match=rf"^{path}: model_type 't5' is not supported"):
        read_shape(str(path))


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_a_config_lacks_is_not_made_up(tmp_path: Path, name: str) -> None:
    for without in (
        {key: value for key, value in LLAMA_33B.items() if key != name},
        {**LLAMA_33B, name: None},
    ):
        path = write_config(tmp_path, without).rename(tmp_path / "b.json")
        with pytest.raises(ModelError, match=rf"^{path}: has no {name}$"):
            read_shape(str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers must be a whole number from 1 to 10000, not 10{12}$",
        ),
        *(({name: 2**31}, f"{name} must be a whole number from 1 to ") for name in SIZES),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings must be a whole number"),
        ({"head_dim": 10**9}, "head_dim must be a whole number from 1 to 4096"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, "a head has 6656 values; the limit is 4096"),
        ({"vocab_size": True}, "vocab_size must be a whole number from 1 to 2147483647, not True"),
        ({"hidden_size": "6656"}, "hidden_size must be a whole number .* not '6656'"),
        ({"hidden_size": -1}, "hidden_size must be a whole number"),
        ({"num_key_value_heads": 5}, "5 key-value heads do not divide 52 heads"),
        ({"hidden_act": "step"}, "hidden_act 'step' is not supported"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
            "a field has the wrong type or value",
        ),
        ({"quantization_config": "nf4"}, "a field has the wrong type or value"),
        ({"rms_norm_eps": "small"}, "a field has the wrong type or value"),
    ],
)
def test_a_config_that_is_wrong_is_named_as_it_was_given(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    path = write_config(tmp_path, {**LLAMA_33B, **values}).rename(tmp_path / "b.json")
    with pytest.raises(ModelError, match=rf"^{path}: {message}"):
        read_shape(str(path))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(
    name=st.sampled_from(
        [
            *LLAMA_33B,
            "head_dim",
            "rope_scaling",
            "rope_theta",
            "quantization_config",
            "layer_types",
            "attention_bias",
        ]
    ),
    family=st.sampled_from(["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"]),
    value=_JSON,
)
@settings(max_examples=200, deadline=None)
def test_any_config_is_read_or_refused_by_its_path(
    tmp_path_factory: pytest.TempPathFactory, name: str, family: str, value: Any
) -> None:
    path = write_config(tmp_path_factory.mktemp("config"), {**LLAMA_33B, "model_type": family, name: value})
    try:
        read_shape(str(path))
    except ModelError as error:
        assert "config.json" not in str(error).removeprefix(f"{path}: ")  # noqa: PT017


@pytest.mark.parametrize(
    "source", ["/nonexisting", "./none", "../none/x", "~/none", "~nobody/none", "m/b.json"]
)
def test_a_path_that_is_not_there_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"^{source}: there is no such file or directory$"):
        read_shape(source)


def test_a_config_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="pipe: is neither a regular file nor a directory"):
        read_shape(str(tmp_path / "pipe"))


def test_a_known_model_that_is_not_fetched_is_not_fetched_for_this(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`manyhats model fetch smollm2-135m-instruct` gets it"):
        read_shape("smollm2-135m-instruct", tmp_path)


def test_the_process_counts_on_a_cpu_and_the_context_on_cuda() -> None:
    here = machine_of(ModelSettings(device="cpu", dtype="float32"), num_unread_tokens=0)
    assert here.runtime_bytes > resident_bytes() - 2**20 > 100 * 2**20
    there = machine_of(ModelSettings(device="cuda"), num_unread_tokens=10**6)
    assert (there.device, there.element_bytes) == ("cuda", 2)
    assert there.runtime_bytes < 2**30


def test_batches_of_optimization_settings() -> None:
    batch = longest_rows(OptimizationSettings(batch_size=3), 10)
    assert (batch.num_tokens, batch.num_padded, batch.num_targets) == (30, 30, 27)
