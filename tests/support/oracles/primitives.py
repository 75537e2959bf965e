"""A lowered adapter on a transformers model, by plain hooks: slow, obvious, the oracle of lowering and engine.

Each primitive is written out once, as its docstring says it. The decoder around it is transformers' own, so any
family works whose layers have ``self_attn`` and ``mlp``, fused projections and norms after a sub-layer included.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    KVPrefix,
    LayerNorm,
    LoweredAdapter,
    LowRank,
    PromptEmbeddings,
)
from manyhats.adapters.sites import BaseDescription, Part, Site

P = TypeVar("P")


@torch.no_grad()
def logits_with(model: Any, lowered: LoweredAdapter, input_ids: Sequence[int] | Tensor) -> Tensor:
    """Logits of every real token, one sequence by itself.

    Args:
        model: transformers' causal language model, dense; it is left as it was.
        lowered: any primitives.
        input_ids: [T], or [1, T].

    Returns:
        [T, V] float32. Virtual tokens have no rows.

    On layers with a sliding window, virtual tokens count as the sequence's first positions.
    """
    ids = torch.as_tensor(input_ids).reshape(1, -1)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(_eager_attention(model))
        for handle in _install(model, lowered):
            hooks.callback(handle.remove)
        logits: Tensor = _run(model, lowered, ids)
    return logits[0].float()


def _run(model: Any, lowered: LoweredAdapter, ids: Tensor) -> Tensor:
    prefix, length = lowered.prefix, ids.shape[1]
    if isinstance(prefix, KVPrefix):
        first = prefix.num_virtual_tokens + prefix.position_offset
        positions = torch.arange(first, first + length).unsqueeze(0)
        result = model(
            input_ids=ids, position_ids=positions, past_key_values=_filled_cache(prefix), use_cache=True
        )
    elif isinstance(prefix, PromptEmbeddings):
        # Any ids will do for the virtual tokens: what they embed to is replaced.
        virtual = torch.zeros(1, prefix.num_virtual_tokens, dtype=ids.dtype)
        result = model(input_ids=torch.cat((virtual, ids), dim=1), use_cache=False)
    else:
        result = model(input_ids=ids, use_cache=False)
    logits: Tensor = result.logits
    return logits[:, -length:]


def _filled_cache(prefix: KVPrefix) -> Any:
    """A cache that holds the prefix, [1, Hkv, P, K] per layer; transformers rotates new keys only."""
    transformers: Any = import_module("transformers")
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(
            keys.float().transpose(0, 1).unsqueeze(0), values.float().transpose(0, 1).unsqueeze(0), layer
        )
    return cache


@contextlib.contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Attention written out: some families' soft caps exist in no other form."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _install(model: Any, lowered: LoweredAdapter) -> Iterator[Any]:
    """Put the hooks in; gives their handles."""
    by_site: dict[Site, list[Any]] = defaultdict(list)
    outer: list[Any] = []
    for delta in lowered.deltas:
        if isinstance(delta, LowRank | Affine | InputScale | Bottleneck):
            by_site[delta.site].append(delta)
        else:
            outer.append(delta)
    for index, layer in enumerate(model.model.layers):
        yield from _install_linears(layer, index, by_site)
        yield from _install_bottlenecks(layer, index, by_site)
    yield model.model.embed_tokens.register_forward_hook(_embedding_hook(outer))
    yield model.lm_head.register_forward_hook(_head_hook(outer, by_site.pop(Site(-1, "lm_head"), [])))
    if isinstance(lowered.prefix, PromptEmbeddings):
        yield _install_prompt(model, lowered.prefix)
    if by_site:
        raise ValueError(f"the model has no {', '.join(map(str, by_site))}")


def _install_prompt(model: Any, prompt: PromptEmbeddings) -> Any:
    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].clone()
        hidden[:, : prompt.num_virtual_tokens] = prompt.embeddings.float()
        return (hidden, *args[1:])

    return model.model.layers[0].register_forward_pre_hook(replace)


# The base


@dataclass(frozen=True, slots=True, eq=False)
class TransformersWeights:
    """A ``WeightSource`` over a transformers model."""

    linears: Mapping[Site, tuple[Tensor, Tensor | None]]

    def pooler_norm(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.linears[site]
        return weight.detach().float(), None if bias is None else bias.detach().float()


def describe_model(model: Any, names: Collection[str] = ("test/tiny",)) -> BaseDescription:
    """The base that a transformers model is, weights included; read from its modules alone."""
    config = model.config
    vocab_size, hidden_size = model.model.embed_tokens.weight.shape
    modules = {
        "model.embed_tokens": (Part(Site(-1, "embed_tokens"), range(vocab_size)),),
        "lm_head": (Part(Site(-1, "lm_head"), range(vocab_size)),),
    }
    shapes: dict[str, tuple[int, int]] = {}
    weights: dict[Site, tuple[Tensor, Tensor | None]] = {
        Site(-1, "embed_tokens"): (model.model.embed_tokens.weight, None),
        Site(-1, "lm_head"): (model.lm_head.weight, None),
    }
    for index, layer in enumerate(model.model.layers):
        for path, module, parts in linears_of(layer):
            sites = tuple(Site(index, name) for name, _ in parts)
            rows = [size for _, size in parts]
            ends = itertools.accumulate(rows)
            modules[f"model.layers.{index}.{path}"] = tuple(
                Part(site, range(end - size, end)) for site, size, end in zip(sites, rows, ends, strict=True)
            )
            biases = [None] * len(rows) if module.bias is None else module.bias.split(rows)
            for site, weight, bias in zip(sites, module.weight.split(rows), biases, strict=True):
                shapes[site.name] = (weight.shape[1], weight.shape[0])
                weights[site] = (weight, bias)
    heads = config.num_attention_heads
    return BaseDescription(
        model_type=config.model_type,
        names=frozenset(names),
        digest="sha256:" + "0" * 64,
        num_layers=len(model.model.layers),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        linears=shapes,
        modules=modules,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or hidden_size // heads,
        embedding_scale=float(getattr(model.model.embed_tokens, "embed_scale", 1.0)),
        is_tied=model.lm_head.weight is model.model.embed_tokens.weight,
        weights=TransformersWeights(weights),
    )


# Linears


def _install_linears(layer: Any, index: int, by_site: dict[Site, list[Any]]) -> Iterator[Any]:
    for _, module, parts in linears_of(layer):
        deltas = [by_site.pop(Site(index, name), []) for name, _ in parts]
        if any(deltas):
            rows = [size for _, size in parts]
            yield module.register_forward_hook(_linear_hook(rows, deltas))


def linears_of(layer: Any) -> Iterator[tuple[str, Any, list[tuple[str, int]]]]:
    """Each linear of a layer: its path, itself, and the sites it computes with their numbers of rows, in order."""
    for block_name in ("self_attn", "mlp"):
        block = getattr(layer, block_name)
        for name, module in block.named_children():
            if name == "qkv_proj":
                key_rows = block.num_key_value_heads * block.head_dim
                query_rows = module.out_features - 2 * key_rows
                parts = [("q_proj", query_rows), ("k_proj", key_rows), ("v_proj", key_rows)]
            elif name == "gate_up_proj":
                parts = [("gate_proj", module.out_features // 2), ("up_proj", module.out_features // 2)]
            elif isinstance(module, nn.Linear):
                parts = [(name, module.out_features)]
            else:
                continue
            yield f"{block_name}.{name}", module, parts


def _linear_hook(rows: Sequence[int], deltas: Sequence[Sequence[Any]]) -> Any:
    def replace(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weights = module.weight.split(list(rows))
        biases = [None] * len(rows) if module.bias is None else module.bias.split(list(rows))
        parts = zip(weights, biases, deltas, strict=True)
        return torch.cat([_linear(args[0], w, b, own) for w, b, own in parts], dim=-1)

    return replace


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[Any]) -> Tensor:
    """InputScale, the base linear, Affine, then LowRank of the input as it was."""
    rescaled = x
    for rescaling in _of(InputScale, deltas):
        rescaled = rescaled * rescaling.scale.float()
    y = functional.linear(rescaled, weight, bias)
    for affine in _of(Affine, deltas):
        y = y * (1.0 if affine.scale is None else affine.scale.float())
        y = y + (0.0 if affine.offset is None else affine.offset.float())
    for update in _of(LowRank, deltas):
        y = y + update.scale * (x @ update.a.float().T) @ update.b.float().T
    return y


# Embedding and head


def _embedding_hook(deltas: Sequence[Any]) -> Any:
    def replace(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = args[0]
        table = _with_rows(module.weight, _of(EmbeddingRows, deltas))
        embedded = table[ids]
        for delta in _of(EmbeddingLowRank, deltas):
            embedded = embedded + delta.scale * delta.a.float()[ids] @ delta.b.float().T
        # Granite multiplies later, in its own forward; the Gemmas do it in this module.
        scaled: Tensor = embedded * getattr(module, "embed_scale", 1.0)
        return scaled

    return replace


def _head_hook(deltas: Sequence[Any], head_deltas: Sequence[Any]) -> Any:
    def replace(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight: Tensor = module.weight
        for delta in _of(HeadWeight, deltas):
            weight = delta.weight.float()
        weight = _with_rows(weight, _of(HeadRows, deltas))
        return _linear(args[0], weight, module.bias, head_deltas)

    return replace


def _with_rows(table: Tensor, deltas: Sequence[EmbeddingRows] | Sequence[HeadRows]) -> Tensor:
    table = table.clone()
    for delta in deltas:
        table[delta.ids] = delta.rows.float()
    return table


# Bottlenecks


def _install_bottlenecks(layer: Any, index: int, by_site: dict[Site, list[Any]]) -> Iterator[Any]:
    attention = by_site.pop(Site(index, "attention"), [])
    feed_forward = by_site.pop(Site(index, "feed_forward"), [])
    if not (attention or feed_forward):
        return
    if getattr(layer, "residual_multiplier", 1.0) != 1.0:
        raise ValueError("what a bottleneck reads is not settled where sub-layers' outputs are multiplied")
    # With a norm after each sub-layer, its output is what joins the stream.
    is_sandwich = hasattr(layer, "post_feedforward_layernorm")
    stream: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream["r"] = args[0]

    yield layer.register_forward_pre_hook(remember)
    for deltas, module in (
        (attention, layer.post_attention_layernorm if is_sandwich else layer.self_attn),
        (feed_forward, layer.post_feedforward_layernorm if is_sandwich else layer.mlp),
    ):
        yield module.register_forward_hook(_sub_layer_hook(deltas, stream))


def _sub_layer_hook(deltas: Sequence[Bottleneck], stream: dict[str, Tensor]) -> Any:
    def replace(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        m = output[0] if isinstance(output, tuple) else output
        for delta in deltas:
            m = bottleneck_output(delta, stream["r"], m)
        stream["r"] = stream["r"] + m
        return (m, *output[1:]) if isinstance(output, tuple) else m

    return replace


def bottleneck_output(delta: Bottleneck, r: Tensor, m: Tensor) -> Tensor:
    """The m' of ``Bottleneck``: what joins the stream r in place of the sub-layer's output m; all [..., D]."""
    x = _read(delta.input, r, m)
    if delta.norm_before is not None:
        x = _layer_norm(delta.norm_before, x)
    hidden = _activation(delta.activation)(functional.linear(x, delta.down.float(), delta.down_bias.float()))
    f = delta.scale.float() * functional.linear(hidden, delta.up.float(), delta.up_bias.float())
    if delta.norm_after is not None:
        if delta.norm_residual is not None:
            f = f + _read(delta.norm_residual, r, m)
        f = _layer_norm(delta.norm_after, f)
    return delta.keep * m + delta.carry * r + f


def _read(source: BottleneckInput, r: Tensor, m: Tensor) -> Tensor:
    values: Mapping[BottleneckInput, Tensor] = {
        BottleneckInput.OUTPUT: m,
        BottleneckInput.SUM: r + m,
        BottleneckInput.RESIDUAL: r,
    }
    return values[source]


def _layer_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)


def _activation(name: str) -> Any:
    """The function that AdapterHub gives a name: transformers' own, and one more."""
    if name.lower() == "leakyrelu":
        return functional.leaky_relu
    return import_module("transformers.activations").get_activation(name.lower())


def _of(kind: type[P], deltas: Sequence[Any]) -> list[P]:
    return [delta for delta in deltas if isinstance(delta, kind)]
