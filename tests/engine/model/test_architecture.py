"""What is derived from an architecture, against lists that are written out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from manyhats.adapters.sites import Site
from manyhats.engine.checkpoints.checkpoint import expected_shapes
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.families.fields import OWN_NAMES
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
# Of families whose heads share no keys and leave no choice of their size.
OF_ALL_HEADS = {
    "q_proj": (192, 192),
    "k_proj": (192, 192),
    "v_proj": (192, 192),
    "o_proj": (192, 192),
    "gate_proj": (192, 96),
    "up_proj": (192, 96),
    "down_proj": (96, 192),
}
UNGATED = {**{name: group for name, group in GROUPS.items() if name != "gate_up"}, "up": ("up_proj",)}
POST_NORMED = ("albert", "bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
# Families of experts: as many, of which a row has two.
NUM_EXPERTS = 3
WITH_EXPERTS = ("mixtral", "qwen3_moe")
WITHOUT_GATE = (*POST_NORMED, "falcon", "gpt2", "gpt_neox", "gptj", "opt", "phi", "starcoder2")
WITH_ALL_HEADS = (*POST_NORMED, "falcon", "gpt2", "gpt_neox", "gptj", "modernbert", "opt")
OUTPUT_NORMS = {"attention_output": (64,), "feed_forward_output": (64,)}
PRE_NORMS = {"attention_before": (64,), "feed_forward_before": (64,)}
HEAD_NORMS = {"query": (32,), "key": (32,)}
NORMS = {
    "gemma2": {**PRE_NORMS, **OUTPUT_NORMS},
    "gemma3_text": {**PRE_NORMS, **OUTPUT_NORMS, **HEAD_NORMS},
    "olmo2": {"query": (192,), "key": (64,), **OUTPUT_NORMS},
    "qwen3": {**PRE_NORMS, **HEAD_NORMS},
    "qwen3_moe": {**PRE_NORMS, **HEAD_NORMS},
    "cohere": {"attention_before": (64,)},
    "cohere2": {"attention_before": (64,)},
    "phi": {"attention_before": (64,)},
    "falcon": {"attention_before": (192,)},
    "gptj": {"attention_before": (192,)},
    **{name: {"attention_stream": (192,), "feed_forward_stream": (192,)} for name in POST_NORMED},
    **{
        name: {"attention_before": (192,), "feed_forward_before": (192,)}
        for name in ("gpt2", "gpt_neox", "modernbert", "opt")
    },
}
ORDER_OF_NORMS = (
    "attention_before",
    "query",
    "key",
    "attention_output",
    "attention_stream",
    "feed_forward_before",
    "feed_forward_output",
    "feed_forward_stream",
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


def config_of(family: str) -> dict[str, Any]:
    """The sizes by the names that a family's files have for them; a hidden size that its heads divide."""
    names = {standard: own for own, standard in OWN_NAMES.get(family, {}).items()}
    hidden_size = {"hidden_size": 192} if family in WITH_ALL_HEADS else {}
    fields = {names.get(name, name): value for name, value in {**SIZES, **hidden_size}.items()}
    if family in WITH_EXPERTS:
        fields |= {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return {**fields, "model_type": family, "multi_query": False, "rotary_dim": 16}


def read(family: str) -> Architecture:
    return read_family(config_of(family)).architecture


def linears_of(family: str) -> dict[str, tuple[int, int]]:
    linears = OF_ALL_HEADS if family in WITH_ALL_HEADS else LINEARS
    if family in WITH_EXPERTS:
        attention, feed_forward = list(LINEARS.items())[:4], list(LINEARS.items())[4:]
        experts = {f"experts.{e}.{name}": sizes for e in range(NUM_EXPERTS) for name, sizes in feed_forward}
        return {**dict(attention), "router": (64, NUM_EXPERTS), **experts}
    return {
        name: sizes for name, sizes in linears.items() if name != "gate_proj" or family not in WITHOUT_GATE
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_linears_and_their_groups_are_those_of_every_family_in_the_order_of_the_forward(family: str) -> None:
    linears = linears_of(family)
    names = ("qkv", "o", "up", "down") if family in WITHOUT_GATE else tuple(GROUPS)
    members = {**GROUPS, **UNGATED}
    if family in WITH_EXPERTS:
        members["router"] = ("router",)
        for expert in (f"experts.{e}." for e in range(NUM_EXPERTS)):
            members |= {expert + name: tuple(expert + each for each in GROUPS[name]) for name in names[2:]}
        names = (*names[:2], *list(members)[len({**GROUPS, **UNGATED}) :])
    for block in read(family).blocks:
        shapes = {linear.name: (linear.d_in, linear.d_out) for linear in block.linears()}
        assert list(shapes.items()) == list(linears.items())
        assert [(group.name, group.names) for group in block.groups()] == [(n, members[n]) for n in names]
        for group in block.groups():
            assert {linears[name][0] for name in group.names} == {group.d_in}
            assert sum(linears[name][1] for name in group.names) == group.d_out


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_are_those_of_the_family_in_the_order_of_the_forward(family: str) -> None:
    for layer, block in enumerate(read(family).blocks):
        expected = dict(NORMS.get(family, PRE_NORMS))
        if family == "modernbert" and not layer:
            del expected["attention_before"]  # what it reads has been normed: the embeddings
        found = {shape.name: shape.shape for shape in block.norms()}
        assert list(found) == [name for name in ORDER_OF_NORMS if name in expected]
        assert found == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_s_files_have_a_place_for_each_linear_and_norm(family: str) -> None:
    found = read_family(config_of(family))
    block = found.architecture.blocks[0]
    stored = [name for each in found.layout.modules_of(block).values() for name in each.members]
    assert sorted(stored) == sorted(linear.name for linear in block.linears())
    norms = {shape.name for block in found.architecture.blocks for shape in block.norms()}
    assert found.layout.norms.keys() == norms


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


def test_sites_of_a_mixture_are_its_router_and_each_expert_s_linears() -> None:
    found = read_family({**config_of("qwen3_moe"), "mlp_only_layers": [1]}).architecture
    of_layers = [[site for site in found.sites() if site.layer == layer] for layer in range(2)]
    sublayers = ["attention", "feed_forward"]
    assert [site.name for site in of_layers[0]] == [*linears_of("qwen3_moe"), *sublayers]
    assert [site.name for site in of_layers[1]] == [*LINEARS, *sublayers]
    assert [site.is_of_mixture for site in of_layers[0]] == [False] * 4 + [True] * 10 + [False] * 2
    assert not any(site.is_of_mixture for site in of_layers[1])


def test_checkpoints_of_experts_are_asked_for_the_tensors_of_each_layer_s_kind() -> None:
    config = {**config_of("qwen3_moe"), "mlp_only_layers": [1], "moe_intermediate_size": 32}
    found = {
        name.removeprefix("model.layers."): shape
        for name, shape in expected_shapes(read_family(config)).items()
        if ".mlp." in name
    }
    assert found == {
        "0.mlp.gate.weight": (NUM_EXPERTS, 64),
        **{
            f"0.mlp.experts.{expert}.{name}.weight": shape
            for expert in range(NUM_EXPERTS)
            for name, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32)))
        },
        **{f"1.{name}": shape for name, shape in SEPARATE.items() if name.startswith("mlp.")},
    }


def test_parameters_of_linears_are_counted_in_all_layers() -> None:
    assert read("llama").num_linear_parameters() == 2 * sum(d_in * d_out for d_in, d_out in LINEARS.values())


def test_an_architecture_needs_no_torch() -> None:
    code = "import sys; import manyhats.engine.model.architecture; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
