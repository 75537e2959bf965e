"""Encoders with every method and head of PEFT, against PEFT; many tasks in a batch as each alone."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, TaskType

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.heads import Pooling
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import EncodeRequest
from support.factories.tiny_encoders import AUTO, ENCODERS, LINEARS, POOLERS, PROJECTIONS, make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.backends import assert_alike, batched_backend, default_backend
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

TEXTS = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (1, 9, 40, 70, 200))
PREFIXED = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
Found = tuple[dict[str, AdapterRecord], Values, Values]


def names_of(family: str) -> list[str]:
    """PEFT has no prefix everywhere, and prompts of its own size only where the embedding is as wide as the layers."""
    prefix = () if family in PREFIXED else ("prefix",)
    left_out = (*prefix, *(PROMPTS if ENCODERS[family].get("embedding_size") else ()))
    return [name for name in CONFIGS if name not in left_out]


def config_of(name: str, family: str, linears: list[str]) -> Any:
    """Where PEFT does not know what to do by itself, it is told."""
    config = CONFIGS[name](linears)
    if family.startswith("modernbert") and name == "span":
        config.modules_to_save = ["classifier"]  # the layer that finds spans
    if family == "distilbert" and name in PROMPTS:
        config.token_dim, config.num_layers, config.num_attention_heads = 64, 2, 4
    return config


def size_of(family: str) -> float:
    """Of adapters' numbers: deltas of queries and keys at once make scores so large that float32 itself is off."""
    return 0.15 if family.startswith("modernbert") else 0.3


@pytest.fixture(scope="module", params=ENCODERS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Records, what the engine found of every text in one batch over all tasks, and what PEFT finds."""
    directory, family = tmp_path_factory.mktemp("encoders"), request.param
    checkpoint = make_encoder(directory / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    expected = {}
    for name in names_of(family):
        config = config_of(name, family, list(LINEARS[family]))
        expected[name] = expected_of(checkpoint, name, config, directory / name, TEXTS, size_of(family))
    records, answers = asyncio.run(answer_all(directory, checkpoint, expected, TEXTS))
    return records, answers, expected


def test_values_are_peft_s(found: Found) -> None:
    _, answers, expected = found
    assert_values_are(answers, expected)


def test_records_say_what_a_task_does(found: Found) -> None:
    assert_kinds_are_right(found[0])


@pytest.mark.parametrize("family", [*POOLERS, *PROJECTIONS])
def test_methods_outside_the_layers_are_peft_s(tmp_path: Path, family: str) -> None:
    outer = {**POOLERS, **PROJECTIONS}[family]
    checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    everywhere = CONFIGS["lora"]("all-linear")
    expected = {"all": expected_of(checkpoint, "lora", everywhere, tmp_path / "all", TEXTS, size_of(family))}
    for name, last in (
        ("lora", 1),
        ("dora", 1),
        ("adalora", 1),
        ("vera", 1),
        ("ia3", 0),
        ("ia3", 1),
        ("tokens", 1),
    ):
        config = CONFIGS[name]([LINEARS[family][0], outer][:: 1 if last else -1])
        task = f"{name}-{last}"
        expected[task] = expected_of(checkpoint, name, config, tmp_path / task, TEXTS, size_of(family))
    _, answers = asyncio.run(answer_all(tmp_path, checkpoint, expected, TEXTS))
    assert_values_are(answers, expected)


@pytest.mark.parametrize("name", ["lora", "vectors"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"])
def test_trained_tokens_and_embeddings_are_peft_s(tmp_path: Path, family: str, name: str) -> None:
    """A model without a head has shorter paths, which PEFT's files then have as well."""
    checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    embedding = "tok_embeddings" if family == "modernbert" else "word_embeddings"
    linears, tokens = list(LINEARS[family]), sorted({TEXTS[1][2], TEXTS[2][3], 7})
    expected = {}
    for task, field, value in (
        ("rows", "trainable_token_indices", tokens),
        ("named-rows", "trainable_token_indices", {embedding: tokens}),
        ("whole", "modules_to_save", [embedding]),
        ("whole-by-path", "modules_to_save", [f"embeddings.{embedding}"]),
    ):
        config = CONFIGS[name](linears)
        setattr(config, field, value)
        expected[task] = expected_of(checkpoint, name, config, tmp_path / task, TEXTS, size_of(family))
    _, answers = asyncio.run(answer_all(tmp_path, checkpoint, expected, TEXTS))
    assert_values_are(answers, expected)


@pytest.mark.parametrize(
    ("family", "auto", "module"),
    [
        ("bert", "AutoModelForMaskedLM", "pooler"),
        ("albert", "AutoModelForMaskedLM", "pooler"),
        ("modernbert", "AutoModel", "head"),
        ("modernbert mean", "AutoModel", "head"),
    ],
)
def test_a_classifier_s_front_layer_is_the_artifact_s_where_the_base_lacks_it(
    tmp_path: Path, family: str, auto: str, module: str
) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=auto)
    config = CONFIGS["lora"](list(LINEARS[family]))
    expected_of(checkpoint, "lora", config, tmp_path / "without", TEXTS)
    with pytest.raises(
        AdapterInvalidError, match=f"{POOLERS[family]}, which neither the file nor the base has"
    ):
        asyncio.run(answer_all(tmp_path, checkpoint, ["without"], TEXTS))
    config = CONFIGS["lora"](list(LINEARS[family]))
    config.modules_to_save = [module]
    expected = {"lora": expected_of(checkpoint, "lora", config, tmp_path / "lora", TEXTS, size_of(family))}
    _, answers = asyncio.run(answer_all(tmp_path, checkpoint, expected, TEXTS))
    assert_values_are(answers, expected)


@pytest.mark.parametrize("family", ["albert", "electra"])
def test_prompts_as_wide_as_the_layers_are_refused_where_embeddings_are_narrower(
    tmp_path: Path, family: str
) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=8)
    with pytest.raises(RuntimeError, match="Expected size 64 but got size 32"):
        expected_of(checkpoint, "prompt", CONFIGS["prompt"]([]), tmp_path / "prompt", TEXTS)
    with pytest.raises(AdapterInvalidError, match="token_dim: is 64; the base has 32"):
        asyncio.run(answer_all(tmp_path, checkpoint, ["prompt"], TEXTS))
    expected = {}
    for name in PROMPTS:
        config = CONFIGS[name]([])
        config.token_dim = 32
        expected[name] = expected_of(checkpoint, name, config, tmp_path / f"narrow-{name}", TEXTS)
    narrow = {f"narrow-{name}": values for name, values in expected.items()}
    _, answers = asyncio.run(answer_all(tmp_path, checkpoint, narrow, TEXTS))
    assert_values_are(answers, narrow)


@pytest.mark.parametrize(
    "backend", [None, TorchBackend(), batched_backend()], ids=["cpu", "torch", "batched"]
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_layers_share_are_kept_once(tmp_path: Path, quantization: str, backend: Any) -> None:
    sizes = []
    for family in ("albert", "albert grouped"):  # two layers of one set of weights, three of two
        model = load_tiny(make_encoder(tmp_path / family, family, seed=3), quantization)
        assert len(model.weights.sets) == model.architecture.num_sets < model.architecture.num_layers
        prepared = (backend or default_backend()).prepare(model.architecture, model.weights)
        sizes.append(prepared.num_bytes["base"])
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize("family", ["albert", "distilbert", "modernbert"])
def test_a_prefix_is_refused_where_peft_has_none(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    config = PrefixTuningConfig(
        task_type=TaskType.SEQ_CLS,
        num_virtual_tokens=5,
        token_dim=64,
        num_attention_heads=4,
        num_layers=3 if family == "modernbert" else 2,
    )
    with pytest.raises(ValueError, match="past key values"):
        expected_of(checkpoint, "prefix", config, tmp_path / "prefix", TEXTS)
    with pytest.raises(
        AdapterUnsupportedError, match=f"no prefix tuning on {family}, whose models take no keys"
    ):
        asyncio.run(answer_all(tmp_path, checkpoint, ["prefix"], TEXTS))


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_hidden_values_are_transformers_s_on_all_backends(
    tmp_path: Path, family: str, quantization: str
) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=3, auto="AutoModelForMaskedLM")
    transformers: Any = import_module("transformers")
    reference = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(False)
    model = load_tiny(checkpoint, quantization)
    assert model.description.has_pooler == family.startswith("modernbert")

    async def encode(backend: Any) -> list[np.ndarray]:
        async with running_engine(model, max_num_batched_tokens=64, backend=backend) as engine:
            asked = EncodeRequest(id="a", inputs=TEXTS[:4], pooling=Pooling.ALL)
            return list((await engine.encode(asked)).values)

    ours, slow, batched = (asyncio.run(encode(each)) for each in (None, TorchBackend(), batched_backend()))
    for ids, fast, plain, at_once in zip(TEXTS, ours, slow, batched, strict=False):
        np.testing.assert_allclose(fast, plain, atol=TOLERANCE, rtol=TOLERANCE)
        np.testing.assert_allclose(at_once, plain, atol=TOLERANCE, rtol=TOLERANCE)
        if quantization == "none":
            with torch.no_grad():
                rows = reference(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
            np.testing.assert_allclose(fast, rows, atol=TOLERANCE, rtol=TOLERANCE)


def test_long_texts_are_transformers_s_where_most_layers_see_a_window(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", "modernbert", seed=3)
    transformers: Any = import_module("transformers")
    reference = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(False)
    texts = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (900, 300, 257))

    async def encode() -> list[np.ndarray]:
        backend = default_backend(num_threads=2)
        async with running_engine(load_tiny(checkpoint), backend=backend) as engine:
            asked = [EncodeRequest(id="a", inputs=(text,), pooling=Pooling.ALL) for text in texts]
            together = [output.values[0] for output in await asyncio.gather(*map(engine.encode, asked))]
            for each, values in zip(asked, together, strict=True):
                assert_alike((await engine.encode(each)).values[0], values)
            return together

    for ids, ours in zip(texts, asyncio.run(encode()), strict=True):
        with torch.no_grad():
            rows = reference(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(ours, rows, atol=TOLERANCE, rtol=TOLERANCE)


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
