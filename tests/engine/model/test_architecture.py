"""What is derived from an architecture, against lists that are written out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from manyhats.adapters.sites import Site
from manyhats.engine.checkpoints.checkpoint import expected_shapes
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.families.reading import FAMILIES, read_family

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
LINEARS = {
    "q_proj": (64, 192),
    "k_proj": (64, 64),
    "v_proj": (64, 64),
    "o_proj": (192, 64),
    "gate_proj": (64, 96),
    "up_proj": (64, 96),
    "down_proj": (96, 64),
}
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PRE_NORMS = {"attention_before": 64, "feed_forward_before": 64}
NORMS = {
    "gemma2": {**PRE_NORMS, "attention_output": 64, "feed_forward_output": 64},
    "gemma3_text": {**PRE_NORMS, "attention_output": 64, "feed_forward_output": 64, "query": 32, "key": 32},
    "olmo2": {"query": 192, "key": 64, "attention_output": 64, "feed_forward_output": 64},
    "qwen3": {**PRE_NORMS, "query": 32, "key": 32},
}
ORDER_OF_NORMS = (
    "attention_before",
    "query",
    "key",
    "attention_output",
    "feed_forward_before",
    "feed_forward_output",
)
# Tensors of a layer with their shapes, in the order in which they are looked for.
SEPARATE = {
    "self_attn.q_proj.weight": (192, 64),
    "self_attn.k_proj.weight": (64, 64),
    "self_attn.v_proj.weight": (64, 64),
    "self_attn.o_proj.weight": (64, 192),
    "mlp.gate_proj.weight": (96, 64),
    "mlp.up_proj.weight": (96, 64),
    "mlp.down_proj.weight": (64, 96),
}
TENSORS = {
    "llama": {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,), **SEPARATE},
    "qwen2": {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (192, 64),
        "self_attn.q_proj.bias": (192,),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.k_proj.bias": (64,),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.v_proj.bias": (64,),
        "self_attn.o_proj.weight": (64, 192),
        "mlp.gate_proj.weight": (96, 64),
        "mlp.up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 96),
    },
    "gemma3_text": {
        "post_attention_layernorm.weight": (64,),
        "post_feedforward_layernorm.weight": (64,),
        "input_layernorm.weight": (64,),
        "pre_feedforward_layernorm.weight": (64,),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
        **SEPARATE,
    },
    "phi3": {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.qkv_proj.weight": (320, 64),
        "self_attn.o_proj.weight": (64, 192),
        "mlp.gate_up_proj.weight": (192, 64),
        "mlp.down_proj.weight": (64, 96),
    },
    "olmo2": {
        "post_attention_layernorm.weight": (64,),
        "post_feedforward_layernorm.weight": (64,),
        "self_attn.q_norm.weight": (192,),
        "self_attn.k_norm.weight": (64,),
        **SEPARATE,
    },
}


def read(family: str) -> Architecture:
    return read_family({**SIZES, "model_type": family}).architecture


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_linears_and_their_groups_are_those_of_every_family_in_the_order_of_the_forward(family: str) -> None:
    for block in read(family).blocks:
        shapes = {linear.name: (linear.d_in, linear.d_out) for linear in block.linears()}
        assert list(shapes.items()) == list(LINEARS.items())
        assert [(group.name, group.names) for group in block.groups()] == list(GROUPS.items())
        for group in block.groups():
            assert {LINEARS[name][0] for name in group.names} == {group.d_in}
            assert sum(LINEARS[name][1] for name in group.names) == group.d_out


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_are_those_of_the_family_in_the_order_of_the_forward(family: str) -> None:
    expected = NORMS.get(family, PRE_NORMS)
    for block in read(family).blocks:
        found = {shape.name: shape.size for shape in block.norms()}
        assert list(found) == [name for name in ORDER_OF_NORMS if name in expected]
        assert found == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_s_files_have_a_place_for_each_linear_and_norm(family: str) -> None:
    found = read_family({**SIZES, "model_type": family})
    block = found.architecture.blocks[0]
    stored = [name for each in found.layout.modules.values() for name in each.members]
    assert sorted(stored) == sorted(linear.name for linear in block.linears())
    assert found.layout.norms.keys() == {shape.name for shape in block.norms()}


@pytest.mark.parametrize("family", TENSORS)
def test_checkpoints_are_asked_for_every_tensor_by_name_and_shape(family: str) -> None:
    expected = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
    if family != "gemma3_text":
        expected["lm_head.weight"] = (320, 64)
    for layer in range(2):
        expected |= {f"model.layers.{layer}.{path}": shape for path, shape in TENSORS[family].items()}
    found = expected_shapes(read_family({**SIZES, "model_type": family}))
    assert list(found.items()) == list(expected.items())


def test_sites_are_the_linears_of_each_layer_the_sub_layers_embedding_and_head() -> None:
    names = (*LINEARS, "attention", "feed_forward")
    layers = [Site(layer, name) for layer in range(2) for name in names]
    assert list(read("phi3").sites()) == [Site(-1, "embed_tokens"), Site(-1, "lm_head"), *layers]


def test_parameters_of_linears_are_counted_in_all_layers() -> None:
    assert read("llama").num_linear_parameters() == 2 * sum(d_in * d_out for d_in, d_out in LINEARS.values())


def test_an_architecture_needs_no_torch() -> None:
    code = "import sys; import manyhats.engine.model.architecture; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
