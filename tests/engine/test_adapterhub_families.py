"""AdapterHub's bottlenecks, LoRA and IA3 on encoders and GPT-2's kin, against the library's steps in transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manyhats.adapters.sites import BaseDescription, Site
from support.factories.adapterhub import (
    adapterhub_config,
    adapterhub_tensors,
    write_adapterhub,
)
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import make_checkpoint
from support.harnesses.encoding import assert_close, hidden_values, read_all, transformers_model
from support.harnesses.engine import load_tiny
from support.oracles.adapterhub import LibraryBlock

TOLERANCE = 1e-4
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "albert grouped")
PLUS = {"original_ln_after": False, "residual_before_ln": False, "scaling": "channel"}
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "seq-bn": ("seq_bn", {}),
    "double-seq-bn": ("double_seq_bn", {}),
    "par-bn": ("par_bn", {}),
    "compacter": ("compacter", {"phm_dim": 2}),
    "plus": ("seq_bn", PLUS),
    "plus-twice": ("seq_bn", {**PLUS, "mh_adapter": True, "leave_out": [1]}),
    "normed-twice": ("seq_bn", {"residual_before_ln": False, "mh_adapter": True}),
    "sum": ("seq_bn", {"residual_before_ln": "post_add"}),
    "own-norms": ("seq_bn", {"ln_before": True, "ln_after": True, "residual_before_ln": False}),
    "inside": (
        "seq_bn",
        {"ln_after": True, "adapter_residual_before_ln": True, "residual_before_ln": False},
    ),
    "unnormed": ("par_bn", {"original_ln_after": False}),
    "gated": ("double_seq_bn", {"use_gating": True}),
    "gated-parallel": ("par_bn", {"use_gating": True, "leave_out": [1]}),
    "gated-inside": (
        "seq_bn",
        {"use_gating": True, "ln_before": True, "ln_after": True, "adapter_residual_before_ln": True},
    ),
}
# Without the base's norm values grow, and so do errors of rounding.
SCALES = {"unnormed": 0.05}


@dataclass(frozen=True)
class Layers:
    """Paths in transformers' model.

    Attributes:
        path: of a layer, or of a set of weights, by its number.
        linears: those of a layer that AdapterHub adapts: queries, values, both of the feed-forward.
        attention, feed_forward: what makes m, and what norms r + m.
        is_swapped: whether the library takes the attention's m for r.
    """

    path: str
    linears: tuple[str, ...]
    attention: tuple[str, str]
    feed_forward: tuple[str, str]
    is_swapped: bool = False


_BERT = Layers(
    "encoder.layer.{}",
    ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense"),
    ("attention.output.dense", "attention.output.LayerNorm"),
    ("output.dense", "output.LayerNorm"),
)
LAYERS = {
    "distilbert": Layers(
        "transformer.layer.{}",
        ("attention.q_lin", "attention.v_lin", "ffn.lin1", "ffn.lin2"),
        ("attention.out_lin", "sa_layer_norm"),
        ("ffn.lin2", "output_layer_norm"),
    ),
    "albert": Layers(
        "encoder.albert_layer_groups.{}.albert_layers.0",
        ("attention.query", "attention.value", "ffn", "ffn_output"),
        ("attention.dense", "attention.LayerNorm"),
        ("ffn_output", "full_layer_layer_norm"),
        is_swapped=True,
    ),
}


@contextmanager
def adapted(model: Any, base: BaseDescription, config: Mapping[str, Any], tensors: Any) -> Iterator[None]:
    """The model with an adapter behind its sub-layers."""
    layers = LAYERS.get(base.model_type, _BERT)
    inner = config["config"]
    used = [
        name
        for name, flag in (("attention", "mh_adapter"), ("feed_forward", "output_adapter"))
        if inner[flag]
    ]
    with ExitStack() as hooks:
        for index in range(base.num_layers):
            layer = model.get_submodule(layers.path.format(index))
            for name in used if index not in inner["leave_out"] else ():
                dense, norm = (layer.get_submodule(path) for path in getattr(layers, name))
                block = LibraryBlock(inner, tensors, Site(index, name), base, norm.forward)
                seen: dict[str, Tensor] = {}
                hooks.callback(dense.register_forward_hook(_remember(seen)).remove)
                is_swapped = layers.is_swapped and name == "attention"
                hooks.callback(norm.register_forward_hook(_replace(block, seen, is_swapped)).remove)
        yield


def _remember(seen: dict[str, Tensor]) -> Callable[..., None]:
    return lambda module, args, output: seen.update(m=output)


def _replace(block: LibraryBlock, seen: dict[str, Tensor], is_swapped: bool) -> Callable[..., Tensor]:
    def replace(module: Any, args: Any, output: Any) -> Tensor:
        m, r = seen["m"], args[0] - seen["m"]
        return block.stream_after(r, m) if is_swapped else block.stream_after(m, r)

    return replace


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_on_every_encoder_is_the_librarys(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded = load_tiny(checkpoint)
    base = loaded.description
    reference = transformers_model(checkpoint)
    expected = {"": hidden_values(reference)}
    for seed, (name, (preset, fields)) in enumerate(VARIANTS.items()):
        config = adapterhub_config(base, preset, **fields)
        tensors = adapterhub_tensors(base, config, seed=seed, scale=SCALES.get(name, 0.3))
        write_adapterhub(tmp_path / name, config, tensors)
        with adapted(reference, base, config, tensors):
            expected[name] = hidden_values(reference)
    found = asyncio.run(read_all(loaded, tmp_path, VARIANTS, "cpu"))
    plain = asyncio.run(read_all(loaded, tmp_path, VARIANTS, "torch"))
    batched = asyncio.run(read_all(loaded, tmp_path, VARIANTS, "torch-batched"))
    for name, wanted in expected.items():
        for values in (found[name], plain[name], batched[name]):
            assert_close(values, wanted, name, TOLERANCE)
    for name in VARIANTS:
        assert max(np.abs(a - b).max() for a, b in zip(expected[name], expected[""], strict=True)) > 0.05


@torch.no_grad()
def merge(
    model: Any, base: BaseDescription, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Changes the model's weights as a LoRA or IA3 would its outputs."""
    inner = config["config"]
    for name, b in tensors.items():
        module, _, part = name.removeprefix(base.prefix).partition(".loras.")
        linear = model.get_submodule(module)
        if inner["composition_mode"] == "scale":
            linear.weight.mul_(b)
            linear.bias.mul_(b[:, 0])
        elif part.endswith("lora_B"):
            a = tensors[name.removesuffix("lora_B") + "lora_A"]
            linear.weight.add_(b @ a * (inner["alpha"] / inner["r"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_ia3_are_those_merged_into_the_weights(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded = load_tiny(checkpoint)
    expected = {}
    for seed, preset in enumerate(("lora", "ia3")):
        model = transformers_model(checkpoint)
        fields = {"attn_matrices": ["q", "v"], "intermediate_lora": True, "output_lora": True}
        config = adapterhub_config(loaded.description, preset, **fields)
        tensors = adapterhub_tensors(loaded.description, config, seed=seed)
        write_adapterhub(tmp_path / preset, config, tensors)
        merge(model, loaded.description, config, tensors)
        expected[preset] = hidden_values(model)
    found = asyncio.run(read_all(loaded, tmp_path, expected, "cpu"))
    for name, wanted in expected.items():
        assert_close(found[name], wanted, name, TOLERANCE)


@contextmanager
def prefixed(model: Any, keys: Tensor, values: Tensor) -> Iterator[None]:
    """The model whose layers, in turn, attend to a prefix of their own first; keys and values are [L, H, P, K]."""
    transformers: Any = import_module("transformers")
    number = count()

    def attend(
        module: Any, queries: Tensor, own_keys: Tensor, own_values: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        layer = next(number) % len(keys)
        all_keys, all_values = (
            torch.cat((prefix[layer][None], own), dim=2)
            for prefix, own in ((keys, own_keys), (values, own_values))
        )
        weights = torch.softmax(queries @ all_keys.transpose(2, 3) * queries.shape[-1] ** -0.5, dim=-1)
        return (weights @ all_values).transpose(1, 2), None

    transformers.AttentionInterface.register("prefixed", attend)
    model.set_attn_implementation("prefixed")
    yield
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_seen_in_every_layer_and_move_no_position(tmp_path: Path, family: str) -> None:
    checkpoint = make_encoder(tmp_path / "model", family, seed=4)
    loaded = load_tiny(checkpoint)
    base = loaded.description
    model = transformers_model(checkpoint)
    expected = {"": hidden_values(model)}
    for seed, name in enumerate(("prefix", "prefix_flat")):
        config = adapterhub_config(base, name)
        tensors = adapterhub_tensors(base, config, seed=seed, scale=0.7)
        write_adapterhub(tmp_path / name.replace("_", "-"), config, tensors)
        with prefixed(model, *table_of(base, config["config"], tensors)):
            expected[name.replace("_", "-")] = hidden_values(model)
    names = [name for name in expected if name]
    for backend in ("cpu", "torch", "torch-batched"):
        found = asyncio.run(read_all(loaded, tmp_path, names, backend))
        for name, wanted in expected.items():
            assert_close(found[name], wanted, name, TOLERANCE)
    for name in names:
        assert max(np.abs(a - b).max() for a, b in zip(expected[name], expected[""], strict=True)) > 0.05


def table_of(
    base: BaseDescription, inner: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, P, K] of a prefix, as the library makes them."""
    by_end = {
        name.rpartition("self_prefix.")[2].rpartition("self.")[2]: tensor for name, tensor in tensors.items()
    }
    if inner["flat"]:
        table = by_end["control_trans"]
    else:
        hidden = torch.tanh(
            by_end["wte.weight"] @ by_end["control_trans.0.weight"].T + by_end["control_trans.0.bias"]
        )
        table = hidden @ by_end["control_trans.2.weight"].T + by_end["control_trans.2.bias"]
    table = table.view(inner["prefix_length"], base.num_layers, 2, base.num_kv_heads, base.head_dim)
    layers = list(base.shared or range(base.num_layers))
    keys, values = table.permute(2, 1, 3, 0, 4)[:, layers]
    return keys, values


# Decoders without such a norm


@contextmanager
def adapted_decoder(
    model: Any, base: BaseDescription, config: Mapping[str, Any], tensors: Any
) -> Iterator[None]:
    """The model with an adapter behind its sub-layers; what the second adds to is what the first left."""
    with ExitStack() as hooks:
        for index, layer in enumerate(model.h):
            seen: dict[str, Tensor] = {}
            hooks.callback(layer.register_forward_pre_hook(_remember_stream(seen)).remove)
            for name, module in (("attention", layer.attn), ("feed_forward", layer.mlp)):
                is_used = config["config"]["mh_adapter" if name == "attention" else "output_adapter"]
                block = LibraryBlock(config["config"], tensors, Site(index, name), base) if is_used else None
                hooks.callback(module.register_forward_hook(_join(block, seen)).remove)
        yield


def _remember_stream(seen: dict[str, Tensor]) -> Callable[..., None]:
    return lambda module, args: seen.update(r=args[0])


def _join(block: LibraryBlock | None, seen: dict[str, Tensor]) -> Callable[..., Any]:
    def replace(module: Any, args: Any, output: Any) -> Any:
        m, r = output[0] if isinstance(output, tuple) else output, seen["r"]
        seen["r"] = r + m if block is None else block.stream_after(m, r)
        changed = seen["r"] - r
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return replace


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_bottlenecks_on_decoders_read_the_stream_of_either_sub_layer(tmp_path: Path, family: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family, seed=4)
    loaded = load_tiny(checkpoint)
    base, names = loaded.description, ("seq-bn", "double-seq-bn", "par-bn", "plus")
    model = transformers_model(checkpoint)
    expected = {"": hidden_values(model)}
    for seed, name in enumerate(names):
        preset, fields = VARIANTS[name]
        config = adapterhub_config(base, preset, **fields)
        tensors = adapterhub_tensors(base, config, seed=seed, scale=0.3)
        write_adapterhub(tmp_path / name, config, tensors)
        with adapted_decoder(model, base, config, tensors):
            expected[name] = hidden_values(model)
    found = asyncio.run(read_all(loaded, tmp_path, names, "cpu"))
    for name, wanted in expected.items():
        assert_close(found[name], wanted, name, TOLERANCE)


@torch.no_grad()
def test_a_lora_on_heads_whose_rows_are_computed_in_another_order(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "gptj", seed=4)
    loaded = load_tiny(checkpoint)
    model = transformers_model(checkpoint)
    config = adapterhub_config(loaded.description, "lora", attn_matrices=["q", "k", "v"], output_lora=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for index in range(2):
        for below in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_out"):
            linear = model.get_submodule(f"h.{index}.{below}")
            d_out, d_in = linear.weight.shape
            a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, d_in), (d_out, 4)))
            name = f"transformer.h.{index}.{below}.loras.{config['name']}"
            tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
            linear.weight.add_(b @ a * 2)
    write_adapterhub(tmp_path / "lora", config, tensors)
    found = asyncio.run(read_all(loaded, tmp_path, ["lora"], "cpu"))
    assert_close(found["lora"], hidden_values(model), "lora", TOLERANCE)
