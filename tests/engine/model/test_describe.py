from __future__ import annotations

from typing import Any

from manyhats.adapters.sites import BaseDescription, Part, Site
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import read_family

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
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sites_at(description: BaseDescription, path: str) -> list[Site]:
    return [part.site for part in description.modules[path]]


def test_description_names_every_linear_as_a_site() -> None:
    family = read_family({**TINY, "head_dim": 32})
    description = describe(family, names=["tiny"], digest="sha256:00")
    assert description.linears["q_proj"] == (64, 128)
    assert description.linears["k_proj"] == (64, 64)
    assert description.linears["o_proj"] == (128, 64)
    assert description.linears["down_proj"] == (128, 64)
    assert len(description.modules) == 3 * 7 + 2
    assert sites_at(description, "model.embed_tokens") == [Site(-1, "embed_tokens")]
    assert sites_at(description, "lm_head") == [Site(-1, "lm_head")]
    assert sorted(description.linears) == sorted(LINEARS)
    assert (description.num_kv_heads, description.head_dim, description.is_tied) == (2, 32, False)
    assert all(len(parts) == 1 for parts in description.modules.values())
    assert sites_at(description, "model.layers.2.mlp.up_proj") == [Site(2, "up_proj")]
    assert description.names == {"tiny"}
    assert (description.num_layers, description.hidden_size, description.vocab_size) == (3, 64, 320)


def test_description_of_fused_modules_names_their_parts_in_row_order() -> None:
    description = describe(read_family({**TINY, "model_type": "phi3"}), names=[], digest="sha256:00")
    assert description.modules["model.layers.1.self_attn.qkv_proj"] == (
        Part(Site(1, "q_proj"), range(64)),
        Part(Site(1, "k_proj"), range(64, 96)),
        Part(Site(1, "v_proj"), range(96, 128)),
    )
    assert description.modules["model.layers.0.mlp.gate_up_proj"] == (
        Part(Site(0, "gate_proj"), range(128)),
        Part(Site(0, "up_proj"), range(128, 256)),
    )
    assert "model.layers.0.self_attn.q_proj" not in description.modules
    assert sites_at(description, "model.layers.0.self_attn.o_proj") == [Site(0, "o_proj")]


def test_description_has_the_embedding_s_multiplier() -> None:
    granite = read_family({**TINY, "model_type": "granite", "embedding_multiplier": 12})
    assert describe(granite, names=[], digest="sha256:00").embedding_scale == 12.0
