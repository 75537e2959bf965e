"""What AdapterHub has for encoders alone, against the library's steps in transformers' models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from manyhats.adapters.heads import Pooling
from manyhats.adapters.methods.reft import orthonormal_rows
from manyhats.adapters.primitives import KVPrefix, PrefixGate
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from support.factories.adapterhub import (
    ENCODER_PRESETS,
    adapterhub_config,
    adapterhub_tensors,
    make_adapterhub,
    write_adapterhub,
)
from support.factories.tiny_encoders import make_encoder
from support.harnesses.encoding import TEXTS, assert_close, hidden_values, read_all, transformers_model
from support.harnesses.engine import load_tiny
from support.oracles.adapterhub import gate_of

TOLERANCE = 1e-4
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "albert grouped")
BACKENDS = ("cpu", "torch", "torch-batched")
# Paths of transformers' layers by number, or of the sets of weights that these share; of others than BERT's kin.
LAYERS = {
    "albert": "encoder.albert_layer_groups.{}.albert_layers.0",
    "distilbert": "transformer.layer.{}",
}


@contextmanager
def prompted(model: Any, prompt: Tensor, num_before: int) -> Iterator[None]:
    """The model with vectors among its normed embeddings, after so many rows."""

    def insert(module: Any, args: Any, embedded: Tensor) -> Tensor:
        parts = (embedded[:, :num_before], prompt[None], embedded[:, num_before:])
        return torch.cat(parts, dim=1)

    handle = model.embeddings.register_forward_hook(insert)
    yield
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_enter_behind_the_norm_of_the_embeddings(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    expected, first = {"": hidden_values(reference)}, {}
    for seed, preset in enumerate(("prompt", "prompt_after_bos")):
        config = adapterhub_config(loaded.description, preset)
        tensors = adapterhub_tensors(loaded.description, config, seed=seed, scale=0.5)
        write_adapterhub(tmp_path / preset, config, tensors)
        (prompt,), num_before = tensors.values(), int(preset == "prompt_after_bos")
        with prompted(reference, prompt, num_before):
            rows = hidden_values(reference)
        first[preset] = [each[:1] for each in rows]
        own = [torch.arange(len(each)) for each in rows]
        kept = [(at < num_before) | (at >= num_before + len(prompt)) for at in own]
        expected[preset] = [each[which.numpy()] for each, which in zip(rows, kept, strict=True)]
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, first, backend))
        for name, wanted in expected.items():
            assert_close(found[name], wanted, name, TOLERANCE)
        found = asyncio.run(read_all(loaded, tmp_path, first, backend, pooling=Pooling.FIRST))
        for name, wanted in first.items():
            assert_close(found[name], wanted, name, TOLERANCE)
    assert abs(first["prompt"][1] - expected["prompt"][1][0]).max() > 0.05


@contextmanager
def gated_linears(
    model: Any, base: BaseDescription, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """The model with the LoRA or IA3 at its linears."""
    is_scale = config["config"]["composition_mode"] == "scale"
    with ExitStack() as hooks:
        for name, b in tensors.items():
            if not name.endswith("lora_B"):
                continue
            path = name.removesuffix("lora_B")
            gate = tensors[f"{path}gate.weight"], tensors[f"{path}gate.bias"]
            a = None if is_scale else tensors[f"{path}lora_A"]
            linear = model.get_submodule(path.removeprefix(base.prefix).partition(".loras.")[0])
            hooks.callback(linear.register_forward_hook(partial(_gate_linear, a, b, gate)).remove)
        yield


def _gate_linear(
    a: Tensor | None, b: Tensor, gate: tuple[Tensor, Tensor], module: Any, args: Any, output: Tensor
) -> Tensor:
    factor = gate_of(*gate, args[0])
    return output * (b[:, 0] * factor) if a is None else output + args[0] @ a.T @ b.T * factor


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_lora_and_ia3_are_means_over_the_text(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    expected = {}
    for seed, preset in enumerate(("gated_lora", "gated_ia3")):
        config = adapterhub_config(loaded.description, preset)
        tensors = adapterhub_tensors(loaded.description, config, seed=seed, scale=0.3)
        write_adapterhub(tmp_path / preset, config, tensors)
        with gated_linears(reference, loaded.description, config, tensors):
            expected[preset] = hidden_values(reference)
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, expected, backend))
        for name, wanted in expected.items():
            assert_close(found[name], wanted, name, TOLERANCE)


@torch.no_grad()
def with_prefix(model: Any, prefix: KVPrefix, gates: list[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
    """Hidden values of an eager BERT whose layers see a prefix times their gates; real tokens begin at position 0."""
    seen: dict[int, Tensor] = {}

    class Gated(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
            factors = gate_of(*gates[layer], seen[layer])[0, 0]
            own = (prefix.keys[layer] * factors[0], prefix.values[layer] * factors[-1])
            first, second = (part.transpose(0, 1)[None] for part in own)
            return torch.cat((first, keys), dim=2), torch.cat((second, values), dim=2)

    found = []
    with ExitStack() as hooks:
        for index, layer in enumerate(model.encoder.layer):
            remember = partial(_remember, seen, index)
            hooks.callback(layer.register_forward_pre_hook(remember).remove)
        for ids in TEXTS:
            positions = torch.arange(len(ids))[None] + (2 if "oberta" in type(model).__name__ else 0)
            output = model(
                input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=Gated(), use_cache=True
            )
            found.append(output.last_hidden_state[0].numpy())
    return found


def _remember(seen: dict[int, Tensor], index: int, module: Any, args: Any) -> None:
    seen[index] = args[0]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_gates_of_prefixes_scale_each_layer_s_keys_and_values(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    expected = {}
    for seed, preset in enumerate(("gated_prefix", "gated_prefix_flat")):
        config = adapterhub_config(loaded.description, preset, prefix_length=21)
        tensors = adapterhub_tensors(loaded.description, config, seed=seed, scale=0.4)
        write_adapterhub(tmp_path / preset, config, tensors)
        with closing(open_store(tmp_path / "lowering", loaded.description, [tmp_path])) as store:
            record = store.register(Registration(preset, Uri(str(tmp_path / preset)))).record
            lowered = store.lower(record)
        assert isinstance(lowered.prefix, KVPrefix)
        gates = [
            (delta.gate.weight, delta.gate.bias) for delta in lowered.deltas if isinstance(delta, PrefixGate)
        ]
        expected[preset] = with_prefix(reference, lowered.prefix, gates)
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, expected, backend))
        for name, wanted in expected.items():
            assert_close(found[name], wanted, name, TOLERANCE)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_gates_of_prefixes_scale_what_the_cache_rounded(tmp_path: Path, kv_dtype: str) -> None:
    loaded = load_tiny(make_encoder(tmp_path / "model", seed=4))
    names = ("gated_prefix", "gated_prefix_flat")
    for preset in names:
        make_adapterhub(tmp_path / preset, loaded.description, preset, scale=0.4, prefix_length=21)
    fast, plain, batched = (
        asyncio.run(read_all(loaded, tmp_path, names, backend, kv_cache_dtype=kv_dtype))
        for backend in BACKENDS
    )
    for name, wanted in plain.items():
        assert_close(fast[name], wanted, name, 0.02)
        assert_close(batched[name], wanted, name, 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_union_is_its_parts_composed(tmp_path: Path, family: str) -> None:
    loaded = load_tiny(make_encoder(tmp_path / "model", family, seed=4))
    config = adapterhub_config(loaded.description, "unipelt")
    tensors = adapterhub_tensors(loaded.description, config, seed=2, scale=0.3)
    write_adapterhub(tmp_path / "union", config, tensors)
    parts = []
    holders = ("prefix", ".adapters.", ".loras.")
    for index, inner in enumerate(config["config"]["configs"]):
        own = {name: tensor for name, tensor in tensors.items() if holders[index] in name}
        parts.append(Part(str(write_adapterhub(tmp_path / f"part{index}", {**config, "config": inner}, own))))
    sources = {"union": Uri(str(tmp_path / "union")), "composed": Parts(parts)}
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, sources, backend))
        assert_close(found["union"], found["composed"], backend, 0.0 if backend == "cpu" else TOLERANCE)


@contextmanager
def intervened(
    model: Any, base: BaseDescription, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """The model with ReFT behind its layers."""
    path = LAYERS.get(base.model_type, "encoder.layer.{}")
    with ExitStack() as hooks:
        for index in range(base.num_layers):
            layer = model.get_submodule(path.format(index))
            units = [
                f"{base.prefix}{path.format(index)}.reft_layer.refts.{config['name']}.units.{unit}."
                for unit in ((0, 0) if config["config"]["tied_weights"] else (0, 1))
            ]
            change = partial(_intervene, config["config"], units, tensors)
            hooks.callback(layer.register_forward_hook(change).remove)
        yield


def _intervene(
    inner: Mapping[str, Any],
    units: list[str],
    tensors: Mapping[str, Tensor],
    module: Any,
    args: Any,
    output: Any,
) -> Any:
    x = output[0] if isinstance(output, tuple) else output
    changed, length = x.clone(), x.shape[1]
    first, last = inner["prefix_positions"], inner["suffix_positions"]
    for unit, rows in ((units[0], slice(0, first)), (units[1], slice(max(length - last, 0), length))):
        own = x[:, rows]
        source = own @ tensors[f"{unit}learned_source.weight"].T + tensors[f"{unit}learned_source.bias"]
        if inner["non_linearity"] == "relu":
            source = source.relu()
        if inner["orthogonality"]:
            saved = f"{unit}projection.parametrizations.weight."
            projection = orthonormal_rows(tensors[f"{saved}original"], tensors[f"{saved}0.base"])
        else:
            projection = tensors[f"{unit}projection.weight"]
        if inner.get("subtract_projection", True):
            source = source - own @ projection.T
        changed[:, rows] = own + source @ projection
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


@pytest.mark.parametrize("family", FAMILIES)
def test_reft_changes_the_ends_of_a_text_behind_each_layer(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    expected = {}
    for seed, (preset, fields) in enumerate(
        (
            ("loreft", {}),
            ("loreft", {"suffix_positions": 2}),
            ("loreft", {"prefix_positions": 0, "suffix_positions": 4, "tied_weights": True}),
            ("noreft", {"prefix_positions": 1}),
            ("direft", {"suffix_positions": 1}),
        )
    ):
        config = adapterhub_config(loaded.description, preset, **fields)
        tensors = adapterhub_tensors(loaded.description, config, seed=seed, scale=0.3)
        name = f"{preset}-{seed}"
        write_adapterhub(tmp_path / name, config, tensors)
        with intervened(reference, loaded.description, config, tensors):
            expected[name] = hidden_values(reference)
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, expected, backend))
        for name, wanted in expected.items():
            assert_close(found[name], wanted, name, TOLERANCE)


def couple(prefix: str, tensors: Mapping[str, Tensor], module: Any, args: Any, embedded: Tensor) -> Tensor:
    """The library's NICE block, with relu."""

    def network(name: str, x: Tensor) -> Tensor:
        first, second = (
            (tensors[f"{prefix}{name}.{index}.weight"], tensors[f"{prefix}{name}.{index}.bias"])
            for index in (0, 2)
        )
        return (x @ first[0].T + first[1]).relu() @ second[0].T + second[1]

    half = embedded.shape[-1] // 2
    x1, x2 = embedded[..., :half], embedded[..., half:]
    y1 = x1 + network("F", x2)
    return torch.cat((y1, x2 + network("G", y1)), dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_invertible_adapters_change_the_normed_embeddings(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    base = loaded.description
    config = adapterhub_config(base, "seq_bn_inv", leave_out=[0, 1])
    tensors = adapterhub_tensors(base, config, seed=3, scale=0.3)
    write_adapterhub(tmp_path / "inv", config, tensors)
    hook = partial(couple, f"{base.prefix}invertible_adapters.{config['name']}.", tensors)
    handle = reference.embeddings.register_forward_hook(hook)
    expected = hidden_values(reference)
    handle.remove()
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, ["inv"], backend))
        assert_close(found["inv"], expected, backend, TOLERANCE)


def test_an_invertible_adapter_leaves_a_prompt_s_vectors_as_they_are(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "model", seed=4)
    loaded, reference = load_tiny(checkpoint), transformers_model(checkpoint)
    base = loaded.description
    inner = dict(ENCODER_PRESETS["seq_bn_inv"]) | {"leave_out": [0, 1]}
    config = adapterhub_config(base, "unipelt", configs=[ENCODER_PRESETS["prompt"], inner])
    tensors = adapterhub_tensors(base, config, seed=3, scale=0.3)
    write_adapterhub(tmp_path / "both", config, tensors)
    prompt = next(tensor for name, tensor in tensors.items() if "prompt_embedding" in name)
    hook = partial(couple, f"{base.prefix}invertible_adapters.{config['name']}.", tensors)
    handle = reference.embeddings.register_forward_hook(hook)
    with prompted(reference, prompt, 0):
        expected = [rows[len(prompt) :] for rows in hidden_values(reference)]
    handle.remove()
    for backend in BACKENDS:
        found = asyncio.run(read_all(loaded, tmp_path, ["both"], backend))
        assert_close(found["both"], expected, backend, TOLERANCE)
