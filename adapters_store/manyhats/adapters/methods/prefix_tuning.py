"""Prefix tuning: keys and values before the sequence in every layer, as PEFT and AdapterHub save it.

Source: Li and Liang 2021 (arXiv:2101.00190).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from manyhats.adapters.activations import ACTIVATIONS, activation_name
from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError, shown
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.fields import (
    check_gating,
    read_count,
    read_flag,
    read_leave_out,
    refuse_unserved,
)
from manyhats.adapters.formats.adapterhub.places import places_of
from manyhats.adapters.formats.adapterhub.tensors import (
    TensorNames,
    check_shapes,
    gate_shapes,
    pick_gate,
    plain_name,
)
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
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PrefixGate
from manyhats.adapters.sites import BaseDescription, Site

# They say how it was trained: what PEFT saves is the projection's result, not what goes into it. A cartridge
# (num_frozen_tokens) is saved, laid out and read as a prefix is.
_PREFIX_FIELDS = frozenset(("encoder_hidden_size", "init_weights", "prefix_projection"))
_CARTRIDGE_FIELDS = frozenset(("num_frozen_tokens",))

_WITHOUT_PAST = frozenset(("albert", "distilbert", "modernbert"))
"""Families whose models take no keys and values, so that PEFT refuses a prefix."""
_MODEL_TYPES = ("albert", "bert", "distilbert", "electra", "llama", "mistral", "roberta", "xlm-roberta")
_KNOWN = frozenset(
    (
        "architecture",
        "flat",
        "prefix_length",
        "bottleneck_size",
        "non_linearity",
        "leave_out",
        "use_gating",
        "shared_gating",
        # These matter only in training, or in models with cross-attention.
        "encoder_prefix",
        "cross_prefix",
        "dropout",
        "init_weights_seed",
    )
)
# The library's pickles repeat the table under each layer.
_REPEATED = ".prefix_tuning.pool.prefix_tunings."


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

    def check_base(self, base: BaseDescription) -> None:
        """Refuse a family on which PEFT has none."""
        if base.model_type in _WITHOUT_PAST:
            raise AdapterUnsupportedError(
                "peft_type",
                f"PEFT has no prefix tuning on {base.model_type}, whose models take no keys and values",
            )

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse a prefix whose layers, heads or head size are not the base's."""
        self.check_base(base)
        config = _parse(candidate.config)
        check_num_virtual_tokens(config, limits)
        _check_prefix(config, candidate.shapes, base, candidate.base_model)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The prefix, in its stored dtype; real tokens come after it in position too."""
        self.check_base(base)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        _check_prefix(_parse(artifact.config), shapes, base, artifact.base_model)
        keys, values = split_prefix(artifact.tensors[PROMPT_EMBEDDINGS], base.num_layers, base.num_kv_heads)
        if base.key_order is not None:
            keys = keys[..., list(base.key_order)]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """The config's fields that determine the maths, and where they lie.

    Attributes:
        module: the table module's plain name, with a dot at its end.
        gates: those of the layers' gates; none if there are none.
        num_gates: for keys and values, 1 together or 2.
    """

    num_virtual_tokens: int
    is_flat: bool
    bottleneck_size: int
    activation: str
    module: str
    gates: tuple[str, ...]
    num_gates: int


def prefix_table(
    embeddings: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> Tensor:
    """``W₂ · act(W₁ · E + b₁) + b₂``.

    Args:
        embeddings: E, [P, D].
        w1: [b, D]. b1: [b].
        w2: [2 · L · Hkv · K, b]. b2: [2 · L · Hkv · K].
        activation: a name in ``ACTIVATIONS``.

    Returns:
        [P, 2 · L · Hkv · K].
    """
    return functional.linear(ACTIVATIONS[activation](functional.linear(embeddings, w1, b1)), w2, b2)


@dataclass(frozen=True, slots=True)
class AdapterHubPrefixMethod:
    """Prefix tuning from an AdapterHub directory.

    The table is viewed as [P, 2L, Hkv, K]: layer l has its keys at 2l and its values at 2l + 1. It is stored as it is
    (``flat``) or computed by a small network, ``W₂ · act(W₁ · E + b₁) + b₂`` with E one row per virtual token, which
    is run once, when the adapter is loaded.

    Keys are never rotated. Real token t has position t: the library does not shift positions, PEFT does. With
    ``use_gating`` each layer's keys and values are multiplied by gates of the text.
    """

    @property
    def method(self) -> AdapterMethod:
        """PREFIX_TUNING."""
        return AdapterMethod.PREFIX_TUNING

    def check_base(self, base: BaseDescription) -> None:
        """Refuse a family without a reference, and sliding windows."""
        if base.model_type not in _MODEL_TYPES:
            raise AdapterUnsupportedError(
                "model_type",
                f"AdapterHub's prefix tuning is not served on {shown(base.model_type)}; it is served on "
                + ", ".join(_MODEL_TYPES),
            )
        if base.has_sliding_window:
            # There every token sees the whole prefix; in our blocks it would count as the first positions of the
            # window.
            raise AdapterUnsupportedError(
                "architecture", "AdapterHub's prefix tuning is not served on a base with sliding windows"
            )

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what cannot be served exactly: no tensor missing, left over or of another shape."""
        self.check_base(base)
        config = _read_config(candidate.config, base)
        if config.num_virtual_tokens > limits.max_virtual_tokens:
            raise AdapterTooLargeError(
                "prefix_length",
                f"is {config.num_virtual_tokens}; the limit is {limits.max_virtual_tokens}",
            )
        _check_tensors(config, _names(candidate.shapes, base), candidate.shapes, base)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """A ``KVPrefix``; a flat table keeps its stored dtype, a computed one is float32."""
        self.check_base(base)
        config = _read_config(artifact.config, base)
        names = _names(artifact.tensors, base)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        _check_tensors(config, names, shapes, base)
        count = config.num_virtual_tokens
        table = _table(config, names, artifact.tensors).reshape(
            count, base.num_layers, 2, base.num_kv_heads, base.head_dim
        )
        keys, values = table.permute(2, 1, 0, 3, 4).contiguous()
        gates = (pick_gate(names, artifact.tensors, gate) for gate in config.gates)
        return LoweredAdapter(
            digest=artifact.digest,
            deltas=tuple(PrefixGate(Site(layer, "prefix"), gate) for layer, gate in enumerate(gates)),
            prefix=KVPrefix(keys, values, position_offset=-count),
        )


def _read_config(outer: Mapping[str, Any], base: BaseDescription) -> _Config:
    adapterhub_format.check_base(outer, base)
    config = adapterhub_format.method_config(outer)
    refuse_unserved(config, known=_KNOWN, refused={})
    if left_out := sorted(layer for layer in read_leave_out(config) if 0 <= layer < base.num_layers):
        raise AdapterUnsupportedError(
            "leave_out", f"leaves out layer {left_out[0]}; a prefix is served in every layer or not at all"
        )
    is_flat = read_flag(config, "flat", False)
    name = adapterhub_format.adapter_name(outer)
    check_gating(config, base)
    places, is_gated = places_of(base.model_type), read_flag(config, "use_gating", False)
    return _Config(
        num_virtual_tokens=read_count(config, "prefix_length", 30),
        is_flat=is_flat,
        bottleneck_size=1 if is_flat else read_count(config, "bottleneck_size", 512),
        activation="linear"
        if is_flat
        else activation_name("non_linearity", config.get("non_linearity", "tanh")),
        module=f"prefix_tuning.prefix_tunings.{name}.{places.self_prefix}.",
        gates=tuple(
            f"{places.layer}.{layer}.{places.self_attention}.prefix_tuning.prefix_gates.{name}."
            for layer in range(base.num_layers if is_gated else 0)
        ),
        num_gates=1 if read_flag(config, "shared_gating", True) else 2,
    )


def _names(tensors: Iterable[str], base: BaseDescription) -> TensorNames:
    return TensorNames(tensors, partial(_plain, base))


def _plain(base: BaseDescription, name: str) -> str:
    plain = plain_name(base, name)
    _, is_repeated, rest = plain.partition(_REPEATED)
    return f"prefix_tuning.prefix_tunings.{rest}" if is_repeated else plain


def _check_tensors(
    config: _Config, names: TensorNames, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription
) -> None:
    columns = 2 * base.num_layers * base.num_kv_heads * base.head_dim
    if config.is_flat:
        expected: dict[str, tuple[int, ...]] = {"control_trans": (config.num_virtual_tokens * columns,)}
    else:
        expected = {
            "wte.weight": (config.num_virtual_tokens, base.hidden_size),
            "control_trans.0.weight": (config.bottleneck_size, base.hidden_size),
            "control_trans.0.bias": (config.bottleneck_size,),
            "control_trans.2.weight": (columns, config.bottleneck_size),
            "control_trans.2.bias": (columns,),
        }
    expected = {config.module + part: shape for part, shape in expected.items()}
    for gate in config.gates:
        expected |= gate_shapes(gate, base.hidden_size, config.num_gates)
    check_shapes(names, shapes, expected, base)


def _table(config: _Config, names: TensorNames, tensors: Mapping[str, Tensor]) -> Tensor:
    """All keys and values, in the order that the file has them."""
    if config.is_flat:
        return names.pick(tensors, f"{config.module}control_trans")
    parts = ("wte.weight", *(f"control_trans.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")))
    # In float64, as the order of float32 sums may differ between loads, by alignment and threads.
    embeddings, w1, b1, w2, b2 = (names.pick(tensors, config.module + part).double() for part in parts)
    return prefix_table(embeddings, w1, b1, w2, b2, config.activation).float()
