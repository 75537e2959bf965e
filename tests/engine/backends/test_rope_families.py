"""Rotary embeddings that differ between the families, and between the layers of one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture, Rope
from manyhats.engine.model.families.reading import read_family
from manyhats.engine.model.rotary import RotaryTables

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
NO_ROPE = Rope(())
LONG = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [2.0 + 0.5 * i for i in range(12)],
}


def decoder_of(family: str, length: int | None = None, **fields: Any) -> Architecture:
    return read_family({**TINY, "model_type": family, **fields}, length).architecture


def ropes_of(architecture: Architecture) -> list[Rope]:
    """Of each layer; one without frequencies where there is none."""
    return [block.attention.rope or NO_ROPE for block in architecture.blocks]


def rotary_of(family: str, module: str, **fields: Any) -> Any:
    """The rotary embedding that transformers makes of the same config."""
    config = AutoConfig.for_model(family, **{**TINY, **fields})
    return getattr(
        import_module(f"transformers.models.{module}.modeling_{module}"),
        f"{fields_prefix(family)}RotaryEmbedding",
    )(config)


def fields_prefix(family: str) -> str:
    return {"gemma3_text": "Gemma3", "phi3": "Phi3", "smollm3": "SmolLM3", "qwen3": "Qwen3"}[family]


GEMMA3_SPELLINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "older": {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "newer": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 7e5, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
        }
    },
}


@pytest.mark.parametrize("fields", GEMMA3_SPELLINGS.values(), ids=GEMMA3_SPELLINGS)
def test_gemma3_has_one_rope_for_each_kind_of_layer(fields: dict[str, Any]) -> None:
    common = {"head_dim": 32, "sliding_window_pattern": 2}
    ours = decoder_of("gemma3_text", **common, **fields)
    theirs = rotary_of("gemma3_text", "gemma3", **common, **{k: _copy(v) for k, v in fields.items()})
    local, wide, *again = (torch.tensor(rope.inv_freq) for rope in ropes_of(ours))
    assert torch.equal(local, theirs.sliding_attention_inv_freq)
    assert torch.equal(wide, theirs.full_attention_inv_freq)
    assert not torch.equal(local, wide)
    assert torch.equal(again[0], local)
    assert torch.equal(again[1], wide)


def _copy(value: Any) -> Any:
    """For transformers, which writes into the dictionaries it is given."""
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def test_gemma3_is_limited_by_the_rope_that_reaches_least() -> None:
    decoder = decoder_of("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert decoder.max_context_length == 512
    with pytest.raises(ModelError, match=r"outside \[1, 512\]"):
        decoder_of("gemma3_text", 513, rope_scaling={"rope_type": "linear", "factor": 8.0})


@pytest.mark.parametrize(("length", "factors"), [(64, "short_factor"), (65, "long_factor")])
def test_phi3_rotates_part_of_the_head_by_the_factors_of_its_length(length: int, factors: str) -> None:
    fields: dict[str, Any] = {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
    ours = decoder_of("phi3", length, rope_scaling=LONG, **fields)
    rope = ours.blocks[0].attention.rope
    assert rope is not None
    theirs = rotary_of("phi3", "phi3", rope_scaling=_copy(LONG), **fields)
    theirs(torch.zeros(1), torch.arange(length)[None])
    assert rope.rotary_dim == 24
    assert torch.equal(torch.tensor(rope.inv_freq), theirs.inv_freq)
    assert rope.attention_scaling == pytest.approx(theirs.attention_scaling)
    plain = 1e4 ** -(torch.arange(12) / 12)
    torch.testing.assert_close(torch.tensor(rope.inv_freq) * torch.tensor(LONG[factors]), plain)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_phi3_s_older_names_for_longrope_mean_longrope(kind: str) -> None:
    fields: dict[str, Any] = {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
    older = decoder_of("phi3", rope_scaling={**LONG, "type": kind}, **fields)
    assert older == decoder_of("phi3", rope_scaling=LONG, **fields)


def test_smollm3_has_layers_without_rope() -> None:
    ours = decoder_of("smollm3")
    rope = Rope(tuple(rotary_of("smollm3", "smollm3").inv_freq.tolist()))
    assert ropes_of(ours) == [rope, rope, rope, NO_ROPE]
    assert ropes_of(decoder_of("smollm3", no_rope_layers=[0, 1, 1, 0])) == [NO_ROPE, rope, rope, NO_ROPE]
    assert ropes_of(decoder_of("smollm3", no_rope_layers=[0] * 4)) == [NO_ROPE] * 4
    assert ropes_of(decoder_of("smollm3", no_rope_layers=[1] * 4)) == [rope] * 4


def test_layers_of_one_kind_share_a_table_and_those_without_rope_have_an_empty_one() -> None:
    architecture = decoder_of("smollm3")
    angles = RotaryTables(architecture).at(torch.tensor([5, 0, 511]))
    ropes = [block.attention.rope for block in architecture.blocks]
    assert ropes[0] == ropes[2]
    cos, sin = angles[ropes[0]]
    assert cos.shape == sin.shape == (3, 16)
    assert cos[1].tolist() == [1.0] * 16
    assert ropes[3] is None
    assert angles[None][0].shape == (3, 0)
