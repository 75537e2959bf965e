from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from manyhats.adapters.activations import ALIASES
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture, Experts, Rope
from manyhats.engine.model.families.fields import OWN_NAMES
from manyhats.engine.model.families.reading import FAMILIES, REFUSED, read_family

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def read(config: dict[str, Any], length: int | None = None) -> Architecture:
    return read_family(config, length).architecture


def rope_of(config: dict[str, Any], length: int | None = None) -> Rope:
    rope = read(config, length).attention.rope
    assert rope is not None
    return rope


def windows_of(config: dict[str, Any], length: int | None = None) -> tuple[int | None, ...]:
    return tuple(block.attention.window for block in read(config, length).blocks)


def biased(config: dict[str, Any]) -> set[str]:
    return {linear.name for linear in read(config).blocks[0].linears() if linear.has_bias}


def field_of(theirs: Any, name: str, default: Any = None) -> Any:
    """A field of transformers' config by its usual name; ``default`` where it has none, or nothing in it."""
    own = {standard: own for own, standard in OWN_NAMES.get(theirs.model_type, {}).items()}
    value = getattr(theirs, own.get(name, name), None)
    return default if value is None else value


def eps_of(theirs: Any) -> float:
    if theirs.model_type == "distilbert":
        return 1e-12  # in its code, not in its config
    value: float = (
        getattr(theirs, "norm_eps", None)
        or field_of(theirs, "layer_norm_eps")
        or field_of(theirs, "rms_norm_eps", 1e-5)
    )
    return value


def num_kv_heads_of(theirs: Any) -> int:
    if theirs.model_type == "falcon":
        return 1
    value: int = field_of(theirs, "num_key_value_heads", theirs.num_attention_heads)
    return value


def experts_of(theirs: Any) -> Experts | None:
    if not hasattr(theirs, "num_experts_per_tok"):
        return None
    renormalizes = getattr(theirs, "norm_topk_prob", True)
    return Experts(theirs.num_local_experts, theirs.num_experts_per_tok, renormalizes)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_left_out_have_the_defaults_of_transformers(family: str) -> None:
    theirs: Any = AutoConfig.for_model(family)
    ours = read({"model_type": family})
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    if ours.head is None:  # an encoder
        assert ours.embedding.norm is not None
        assert ours.embedding.norm.eps == eps_of(theirs)
        assert ours.embedding.num_token_types == getattr(theirs, "type_vocab_size", 0)
        positions = ours.embedding.positions
        rows = ours.max_context_length if positions is None else positions.num_rows
        assert rows == theirs.max_position_embeddings
        return
    assert ours.final_norm is not None
    assert ours.final_norm.eps == eps_of(theirs)
    assert ours.head.is_tied == theirs.tie_word_embeddings
    assert ours.max_context_length == theirs.max_position_embeddings
    scale = ours.hidden_size**0.5 if family.startswith("gemma") else 1.0
    assert ours.embedding.scale == getattr(theirs, "embedding_multiplier", scale)
    assert ours.head.divisor == getattr(theirs, "logits_scaling", 1 / getattr(theirs, "logit_scale", 1.0))
    assert ours.head.softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_of_a_block_that_are_left_out_have_the_defaults_of_transformers(family: str) -> None:
    theirs: Any = AutoConfig.for_model(family)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    scalar = getattr(theirs, "query_pre_attn_scalar", head_dim)
    for ours in read({"model_type": family}).blocks:
        assert ours.attention.num_heads == theirs.num_attention_heads
        assert ours.attention.num_kv_heads == num_kv_heads_of(theirs)
        assert ours.attention.head_dim == head_dim
        scale = getattr(theirs, "attention_multiplier", scalar**-0.5)
        assert ours.attention.scale == pytest.approx(scale)
        assert ours.attention.softcap == getattr(theirs, "attn_logit_softcapping", None)
        inner = "intermediate_size" if family != "qwen3_moe" else "moe_intermediate_size"
        assert ours.feed_forward.width == field_of(theirs, inner, 4 * theirs.hidden_size)
        assert ours.feed_forward.experts == experts_of(theirs)
        activation = getattr(theirs, "hidden_activation", None) or field_of(theirs, "hidden_act")
        assert ours.feed_forward.activation == ALIASES.get(activation, activation)
        assert ours.residual_scale == getattr(theirs, "residual_multiplier", 1.0)
        assert {shape.norm.eps for shape in ours.norms()} == {eps_of(theirs)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_windows_left_out_are_those_of_transformers(family: str) -> None:
    theirs: Any = AutoConfig.for_model(family)
    ours = windows_of({"model_type": family})
    window = getattr(theirs, "sliding_window", None)
    if family == "modernbert":
        window += 1  # which counts the token itself
    kinds = getattr(theirs, "layer_types", None)
    slides = [kinds is None or kind == "sliding_attention" for kind in kinds or [None] * len(ours)]
    assert ours == tuple(window if slide else None for slide in slides)


@pytest.mark.parametrize("kind", sorted(ROPES))
def test_frequencies_equal_those_of_transformers(kind: str) -> None:
    raw = {**TINY, "rope_parameters": ROPES[kind]}
    config: Any = AutoConfig.for_model(**{**raw, "rope_parameters": dict(ROPES[kind])})
    theirs = LlamaRotaryEmbedding(config)
    # longrope: transformers starts with the short factors, which hold up to the trained length.
    length = 128 if kind == "longrope" else None
    ours = rope_of(raw, length)
    assert torch.equal(torch.tensor(ours.inv_freq), theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling
    assert ours.rotary_dim == 16


def test_longrope_beyond_the_trained_length_takes_the_long_factors() -> None:
    raw = {**TINY, "rope_parameters": ROPES["longrope"]}
    config: Any = AutoConfig.for_model(**{**raw, "rope_parameters": dict(ROPES["longrope"])})
    theirs = LlamaRotaryEmbedding(config)
    theirs(torch.zeros(1), torch.arange(129)[None])
    assert torch.equal(torch.tensor(rope_of(raw, 129).inv_freq), theirs.inv_freq)


def test_older_spelling_of_rope_is_read_like_the_newer() -> None:
    llama3 = ROPES["llama3"]
    older = {k: v for k, v in llama3.items() if k not in ("rope_theta", "rope_type")}
    raw = {**TINY, "rope_theta": llama3["rope_theta"], "rope_scaling": {**older, "type": "llama3"}}
    assert read(raw) == read({**TINY, "rope_parameters": llama3})


def test_dynamic_rope_is_refused_past_the_length_it_is_exact_for() -> None:
    raw = {**TINY, "rope_parameters": ROPES["dynamic"]}
    assert read(raw).max_context_length == 512
    with pytest.raises(ModelError, match=r"max_context_length 513 is outside \[1, 512\]"):
        read_family(raw, 513)


def test_yarn_serves_the_stretched_length_when_asked() -> None:
    yarn = {**ROPES["yarn"], "original_max_position_embeddings": 512}
    raw = {**TINY, "rope_parameters": yarn}
    assert read(raw).max_context_length == 512
    assert read(raw, 2048).max_context_length == 2048
    with pytest.raises(ModelError, match="max_context_length 2049"):
        read_family(raw, 2049)


def test_head_dim_may_be_explicit() -> None:
    attention = read({**TINY, "head_dim": 32}).attention
    assert attention.head_dim == 32
    assert attention.scale == pytest.approx(32**-0.5)
    assert read(TINY).attention.head_dim == 16


def test_mistral_window_covers_all_layers_unless_no_context_reaches_it() -> None:
    raw = {**TINY, "model_type": "mistral", "sliding_window": 100}
    assert windows_of(raw) == (100, 100, 100)
    assert windows_of(raw, 100) == (None, None, None)
    assert windows_of({**raw, "sliding_window": None}) == (None, None, None)


def test_qwen2_windows_follow_layer_types_and_max_window_layers() -> None:
    raw = {**TINY, "model_type": "qwen2", "sliding_window": 100, "max_window_layers": 2}
    assert windows_of(raw) == (None, None, None)
    raw["use_sliding_window"] = True
    assert windows_of(raw) == (None, None, 100)
    raw["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    assert windows_of(raw) == (100, None, None)


def test_biases_are_the_familys() -> None:
    assert biased(TINY) == set()
    assert biased({**TINY, "attention_bias": True}) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert biased({**TINY, "mlp_bias": True}) == {"gate_proj", "up_proj", "down_proj"}
    assert biased({**TINY, "model_type": "qwen2"}) == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gemma2", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("olmo2", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("granite", LINEARS),
        ("smollm3", LINEARS),
        ("phi3", set()),
    ],
)
def test_bias_fields_count_where_the_family_has_them(family: str, names: set[str]) -> None:
    raw = {**TINY, "model_type": family, "attention_bias": True, "mlp_bias": True}
    assert biased(raw) == names


def test_gemma2_slides_in_every_other_layer_from_the_first() -> None:
    raw = {**TINY, "model_type": "gemma2", "sliding_window": 100}
    assert windows_of(raw) == (100, None, 100)
    raw["layer_types"] = ["full_attention", "full_attention", "sliding_attention"]
    assert windows_of(raw) == (None, None, 100)


def test_albert_s_layers_share_their_weights_group_by_group() -> None:
    raw = {**TINY, "model_type": "albert", "num_hidden_layers": 5}
    assert read(raw).shared == (0, 0, 0, 0, 0)
    grouped = read({**raw, "num_hidden_groups": 2})
    assert grouped.shared == (0, 0, 0, 1, 1)
    assert (grouped.num_layers, grouped.num_sets) == (5, 2)
    assert grouped.num_linear_parameters() == 2 * read(raw).num_linear_parameters()


def test_modernbert_slides_in_two_layers_of_three_each_kind_with_its_own_rotation() -> None:
    raw = {**TINY, "model_type": "modernbert", "local_attention": 100, "local_rope_theta": 300.0}
    assert windows_of(raw) == (None, 51, 51)
    assert windows_of({**raw, "global_attn_every_n_layers": 2}) == (None, 51, None)
    ropes = [block.attention.rope for block in read(raw).blocks]
    assert ropes[1] == ropes[2] != ropes[0]
    newer = {"full_attention": {"rope_theta": 160_000.0}, "sliding_attention": {"rope_theta": 300.0}}
    assert read({**raw, "local_rope_theta": 1.0, "rope_parameters": newer}) == read(raw)
    theirs: Any = AutoConfig.for_model("modernbert")
    found = {
        kind: 1.0 / (theirs.rope_parameters[kind]["rope_theta"] ** (torch.arange(0, 64, 2).float() / 64))
        for kind in ("full_attention", "sliding_attention")
    }
    for block, kind in zip(read({"model_type": "modernbert"}).blocks, theirs.layer_types, strict=True):
        assert block.attention.rope is not None
        assert torch.equal(torch.tensor(block.attention.rope.inv_freq), found[kind])


def test_norms_are_named_by_what_they_do() -> None:
    llama, gemma, olmo = (
        read_family({**TINY, "model_type": family}).layout for family in ("llama", "gemma3_text", "olmo2")
    )
    assert llama.norms["feed_forward_before"] == "post_attention_layernorm"
    assert gemma.norms["feed_forward_before"] == "pre_feedforward_layernorm"
    assert gemma.norms["attention_output"] == "post_attention_layernorm"
    assert gemma.norms["query"] == "self_attn.q_norm"
    assert gemma.norm_offset == 1.0
    assert "attention_before" not in olmo.norms


def test_unsupported_model_type_names_those_that_work() -> None:
    known = ", ".join(sorted(FAMILIES))
    with pytest.raises(ModelError, match=f"'rwkv' is not supported; these are: {known}"):
        read_family({**TINY, "model_type": "rwkv"})
    with pytest.raises(
        ModelError, match="'gemma3' is not supported: a model of images as well; its text model"
    ):
        read_family({"model_type": "gemma3", "text_config": {}})


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_one_might_expect_are_refused_with_the_reason(model_type: str) -> None:
    assert model_type not in FAMILIES
    with pytest.raises(ModelError, match=f"{model_type}' is not supported: .+; these are: "):
        read_family({**TINY, "model_type": model_type})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; these are: silu"),
        ({"model_type": "gemma2", "hidden_activation": "mish"}, "hidden_act 'mish'"),
        ({"model_type": "gemma", "hidden_activation": "relu"}, "hidden_activation 'relu' is not hidden_act"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 9.0}, "attn_logit_softcapping 9.0"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}}, "by layer type"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries for 3"),
        ({"model_type": "smollm3", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ({"model_type": "qwen3", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "times partial_rotary_factor 0.2"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "is 0"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_type 'axial' is not one of default"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "kind 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"num_key_value_heads": "2"}, "wrong type"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 3"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "ministral"),
        ({"model_type": "albert", "inner_group_num": 2}, "inner_group_num 2 is not supported"),
        ({"model_type": "albert", "num_hidden_groups": 4}, r"num_hidden_groups 4 is outside \[1, 3\]"),
        ({"model_type": "albert", "num_hidden_groups": 0}, r"num_hidden_groups 0 is outside \[1, 3\]"),
        ({"model_type": "albert", "embedding_size": 64}, "embedding_size equal to hidden_size"),
        ({"model_type": "modernbert", "num_attention_heads": 5}, "5 heads do not divide a hidden_size of 64"),
        (
            {"model_type": "modernbert", "classifier_pooling": "max"},
            "classifier_pooling 'max' is not one of cls, mean",
        ),
        ({"model_type": "modernbert", "classifier_activation": "silu"}, "classifier_activation 'silu'"),
        ({"model_type": "modernbert", "local_attention": -1}, "local_attention must be at least 0, not -1"),
        ({"model_type": "modernbert", "global_attn_every_n_layers": 0}, "is 0"),
        ({"model_type": "modernbert", "global_rope_theta": None}, "wrong type"),
        ({"model_type": "modernbert", "rope_parameters": {"rope_type": "default"}}, "by layer type"),
        ({"model_type": "modernbert", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 3"),
        ({"model_type": "modernbert", "hidden_activation": "mish"}, "hidden_act 'mish'"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_experts must be a positive integer, not 0"),
        (
            {"model_type": "mixtral", "num_local_experts": 30_000},
            "30000 experts in 3 layers are more than the 65536",
        ),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 10**12}, "in 1000000000000 layers are more than"),
        ({"model_type": "mixtral", "num_local_experts": True}, "num_experts must be a positive integer"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9, of only 8"),
        ({"model_type": "mixtral", "num_experts_per_tok": "2"}, "num_experts_per_tok must be a positive"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step must be a positive"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": "1"}, "mlp_only_layers must be a list of layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [[1]]}, "mlp_only_layers must be a list of layers"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": -64}, "moe_intermediate_size must be a pos"),
        (
            {"model_type": "qwen2_moe"},
            "'qwen2_moe' is not supported: an expert that all tokens share; of Qwen's mixtures, qwen3_moe is",
        ),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_family({**TINY, **fields})


def test_layers_have_experts_where_transformers_has_them() -> None:
    raw = {
        **TINY,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 7,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    raw |= {"decoder_sparse_step": 2, "mlp_only_layers": [3, 20]}
    blocks = read(raw).blocks
    assert [block.feed_forward.experts is not None for block in blocks] == [
        False, True, False, False, False, True, False
    ]  # fmt: skip
    assert {block.feed_forward.width for block in blocks} == {128, 768}


@pytest.mark.parametrize("length", [0, -1, 513])
def test_context_length_outside_the_model_is_refused(length: int) -> None:
    with pytest.raises(ModelError, match="max_context_length"):
        read_family(TINY, length)
