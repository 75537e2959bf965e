"""Families whose feed-forwards are mixtures of experts: Mixtral, and Qwen's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from manyhats.adapters.sites import ROUTER, expert_linear
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Experts
from manyhats.engine.model.families.decoder import LLAMA, NORMS_BEFORE, QK_NORMS, Kind, decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, with_defaults
from manyhats.engine.model.layout import Family, Layout, Stored

_MOST_EXPERTS = 2**16
"""In all layers; more are taken for a mistake in the config, and would not be described in reasonable memory."""


def mixtral(config: RawConfig, max_context_length: int | None) -> Family:
    """Mixtral: Mistral with experts in every layer, their weights always renormalized."""
    full = with_defaults(
        config,
        vocab_size=32000,
        intermediate_size=14336,
        max_position_embeddings=4096 * 32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        num_experts=8,
        num_experts_per_tok=2,
    )
    num_layers = full["num_hidden_layers"]
    experts = _experts(full, renormalizes=True)
    paths = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return decoder(
        full,
        max_context_length,
        kind=Kind(feed_forwards=((full["intermediate_size"], experts),) * num_layers),
        layout=_layout(LLAMA.norms, experts, "block_sparse_moe", paths),
        windows=(full["sliding_window"],) * num_layers,
    )


def qwen3_moe(config: RawConfig, max_context_length: int | None) -> Family:
    """Qwen3 with experts in those layers that the config does not leave dense."""
    full = with_defaults(
        config,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=None,
    )
    num_layers = full["num_hidden_layers"]
    experts = _experts(full, renormalizes=bool(full["norm_topk_prob"]))
    _check_count(full, "moe_intermediate_size")
    mixture, dense = (full["moe_intermediate_size"], experts), (full["intermediate_size"], None)
    paths = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    window = full["sliding_window"] if full["use_sliding_window"] else None
    return decoder(
        full,
        max_context_length,
        kind=Kind(feed_forwards=tuple(mixture if each else dense for each in _has_experts(full))),
        layout=_layout({**NORMS_BEFORE, **QK_NORMS}, experts, "mlp", paths),
        biased=biased_groups(full, feed_forward=False),
        windows=(window,) * num_layers,
    )


def _has_experts(full: RawConfig) -> list[bool]:
    """Of each layer: every ``decoder_sparse_step``-th has experts, but for ``mlp_only_layers``."""
    _check_count(full, "decoder_sparse_step")
    dense = full["mlp_only_layers"] or ()
    if not all(type(layer) is int for layer in dense):
        raise ModelError(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
    step = full["decoder_sparse_step"]
    return [(layer + 1) % step == 0 and layer not in dense for layer in range(full["num_hidden_layers"])]


def _experts(full: RawConfig, *, renormalizes: bool) -> Experts:
    for name in ("num_experts", "num_experts_per_tok", "num_hidden_layers"):
        _check_count(full, name)
    num, chosen, num_layers = full["num_experts"], full["num_experts_per_tok"], full["num_hidden_layers"]
    if num * num_layers > _MOST_EXPERTS:
        raise ModelError(
            f"config.json: {num} experts in {num_layers} layers are more than the {_MOST_EXPERTS} supported"
        )
    if chosen > num:
        raise ModelError(f"config.json: num_experts_per_tok is {chosen}, of only {num} experts")
    return Experts(num, chosen, renormalizes)


def _check_count(full: RawConfig, name: str) -> None:
    value: Any = full[name]
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, not {value!r}")


def _layout(norms: Mapping[str, str], experts: Experts, mixture: str, paths: Mapping[str, str]) -> Layout:
    """Llama's, with a mixture's path below the layer, and the paths of a linear below an expert."""
    below = f"{mixture}.experts"
    matrices = {
        f"{below}.{expert}.{path}": Stored((expert_linear(expert, name),))
        for expert in range(experts.num)
        for name, path in paths.items()
    }
    each = {name: f"{below}.{{expert}}.{path}" for name, path in paths.items()}
    return replace(
        LLAMA,
        norms=norms,
        modules={**LLAMA.modules, f"{mixture}.gate": Stored((ROUTER,)), **matrices},
        stacked={
            "mlp.experts.gate_up_proj": (each["gate_proj"], each["up_proj"]),
            "mlp.experts.down_proj": (each["down_proj"],),
            **({} if mixture == "mlp" else {"mlp.gate": (f"{mixture}.gate",)}),
        },
    )
