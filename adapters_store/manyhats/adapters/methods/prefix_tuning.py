"""Prefix tuning: keys and values before the sequence in every layer, from a PEFT directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.peft.prompt_config import (
    PROMPT_EMBEDDINGS,
    PromptConfig,
    check_fits,
    check_num_virtual_tokens,
    check_shape,
    check_tensor_names,
    parse_prompt_config,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter
from manyhats.adapters.sites import BaseDescription

# They say how it was trained: what PEFT saves is the projection's result, not what goes into it. A cartridge
# (num_frozen_tokens) is saved, laid out and read as a prefix is.
_PREFIX_FIELDS = frozenset(("encoder_hidden_size", "init_weights", "prefix_projection"))
_CARTRIDGE_FIELDS = frozenset(("num_frozen_tokens",))


def split_prefix(flat: Tensor, num_layers: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """The keys and values that one stored row per virtual token holds: layer l's keys at 2l, values at 2l + 1.

    Args:
        flat: [P, 2 · L · Hkv · K].
        num_layers: L.
        num_kv_heads: Hkv.

    Returns:
        Keys and values, each [L, P, Hkv, K], views of ``flat``. Each layer attends to ``[prefix; sequence]``;
        prefix keys are not rotated, and real token t is rotated for position P + t.

    Source: Li and Liang 2021 (arXiv:2101.00190), section 4; layout and positions: PEFT 0.21,
    ``PeftModel.get_prompt``.
    """
    stacked = flat.view(flat.shape[0], num_layers, 2, num_kv_heads, -1)
    keys, values = stacked.permute(2, 1, 0, 3, 4).unbind(0)
    return keys, values


@dataclass(frozen=True, slots=True)
class PrefixTuningMethod:
    """Prefix tuning from a PEFT directory, with or without projection, and PEFT's CARTRIDGE.

    Where a layer has a sliding window of W, virtual tokens are the sequence's first P tokens: a real token sees those
    among the last W positions up to and including its own. PEFT on transformers 5 does the same in every family.
    """

    @property
    def method(self) -> AdapterMethod:
        """PREFIX_TUNING."""
        return AdapterMethod.PREFIX_TUNING

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse a prefix whose layers, heads or head size are not the base's."""
        config = _parse(candidate.config)
        check_num_virtual_tokens(config, limits)
        _check_prefix(config, candidate.shapes, base, candidate.base_model)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The prefix, in its stored dtype; real tokens come after it in position too."""
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        _check_prefix(_parse(artifact.config), shapes, base, artifact.base_model)
        keys, values = split_prefix(artifact.tensors[PROMPT_EMBEDDINGS], base.num_layers, base.num_kv_heads)
        prefix = KVPrefix(keys=keys.contiguous(), values=values.contiguous(), position_offset=0)
        return LoweredAdapter(digest=artifact.digest, deltas=(), prefix=prefix)


def _parse(config: Mapping[str, Any]) -> PromptConfig:
    is_cartridge = config.get("peft_type") == "CARTRIDGE"
    return parse_prompt_config(config, _CARTRIDGE_FIELDS if is_cartridge else _PREFIX_FIELDS)


def _check_prefix(
    config: PromptConfig, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription, base_model: str
) -> None:
    """Check that the config's numbers are the base's, and that the tensor's shape follows from them.

    For grouped-query attention PEFT writes Hkv into ``num_attention_heads`` and Hkv · K into ``token_dim``.
    """
    if base.num_kv_heads < 1 or base.head_dim < 1:
        raise AdapterUnsupportedError(
            "peft_type", "the base's heads are not known, so no prefix can be checked"
        )
    token_dim = base.num_kv_heads * base.head_dim
    check_tensor_names(shapes, (PROMPT_EMBEDDINGS,))
    shape = shapes[PROMPT_EMBEDDINGS]
    if len(shape) != 2:
        raise AdapterInvalidError(PROMPT_EMBEDDINGS, f"has {len(shape)} dimensions; expected 2")
    check_fits("num_layers", config.num_layers, base.num_layers, base, base_model)
    check_fits("num_attention_heads", config.num_attention_heads, base.num_kv_heads, base, base_model)
    check_fits("token_dim", config.token_dim, token_dim, base, base_model)
    if None in (config.num_layers, config.token_dim):
        check_fits(PROMPT_EMBEDDINGS, shape[1], 2 * base.num_layers * token_dim, base, base_model)
    check_shape(PROMPT_EMBEDDINGS, shape, (config.num_virtual_tokens, 2 * base.num_layers * token_dim))
