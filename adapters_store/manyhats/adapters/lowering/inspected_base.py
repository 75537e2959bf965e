"""A base made up from an artifact itself, so that the artifact can be inspected when no base is available.

Checked against it, an artifact is refused only for its own faults: unserved fields, missing and unused tensors, shapes
that contradict each other. Whatever only a real base can tell (how many layers, which widths) fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.places import places_of
from manyhats.adapters.formats.peft.lora_config import parse_lora_config
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.sites import (
    EMBEDDING,
    HEAD,
    POOLER,
    ROUTER,
    BaseDescription,
    ExpertStack,
    Part,
    Site,
    expert_linear,
)

Shape = tuple[int, ...]

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|albert_layer_groups)\.(0|[1-9]\d{0,3})\.")
# A module of a layer, and what follows its path in a tensor's name: of Llama's kin any, of others what methods add.
_LINEAR = re.compile(
    r"^(?:base_model\.model\.)?(?:model\.)?(?P<module>layers\.(?P<layer>\d{1,4})\.(?:self_attn|mlp)\.(?P<name>(?!experts\b)\w+))"
    r"\.(?P<part>.+)$"
)
_OTHER_LINEAR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>(?:\w+\.)*?(?:layers?|h|albert_layer_groups)\.(?P<layer>\d{1,4})\.(?P<name>[\w.]+?))"
    r"\.(?P<part>(?:lora_|vera_|ia3_|loras\.).+)$"
)
# What encoders call linears that AdapterHub's configs name by letter → their site.
_SITES: Mapping[str, str] = {
    **{name: f"{name[0]}_proj" for name in ("query", "key", "value")},
    **{f"{letter}_lin": f"{letter}_proj" for letter in "qkv"},
}
# All experts of a layer in one module, which PEFT wraps once for each of its parameters.
_STACK = re.compile(
    r"^base_model\.model\.(?P<module>(?:\w+\.)*?layers\.(?P<layer>\d{1,4})\.(?:\w+\.)*?experts)"
    r"(?P<wrappers>(?:\.base_layer)*)\.(?P<part>lora_[AB]\.weight)$"
)
_STACKED = ("gate_up_proj", "down_proj")
_ROUTERS = ("gate", "block_sparse_moe.gate")
# Words in the paths of encoders' modules, or of their heads' → the family whose heads it has.
_ENCODERS: Mapping[str, str] = {
    ".Wqkv.": "modernbert",
    ".Wi.": "modernbert",
    ".Wo.": "modernbert",
    ".head.dense": "modernbert",
    "albert": "albert",
    "distilbert.": "distilbert",
    "pre_classifier": "distilbert",
    "electra.": "electra",
    "roberta.": "roberta",
    "classifier.out_proj": "roberta",
    "encoder.layer.": "bert",
    "bert.": "bert",
}
# End of a tensor's name → which axes of its shape are input and output features.
_WIDTHS: Mapping[str, tuple[int | None, int | None]] = {
    "lora_A": (1, None),
    "lora_A.weight": (1, None),
    "lora_B": (None, 0),
    "lora_B.weight": (None, 0),
    "lora_magnitude_vector": (None, 0),
    "vera_lambda_b": (None, 0),
}
_IA3 = "ia3_l"
# What may be in front of a classifier.
_POOLERS = ("pooler.dense", "bert.pooler.dense", "pooler", "albert.pooler", "head.dense")
# What reads hidden rows first, of heads that classify.
_HEADS = ("classifier.dense", "pre_classifier", "classifier", "score", "qa_outputs")
_UNKNOWN_WIDTH = 1
# Any token id fits.
_UNKNOWN_VOCAB_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _OnesSource:
    """Placeholder weights: ones. Constants computed from them are meaningless, but have the right shape."""

    linears: Mapping[str, tuple[int, int]]
    hidden_size: int

    def linear(self, site: Site) -> tuple[Tensor, Tensor | None]:
        d_in, d_out = self.linears.get(site.name, (self.hidden_size, self.hidden_size))
        return torch.ones(d_out, d_in), None

    def pooler_norm(self) -> tuple[Tensor, Tensor | None]:
        return torch.ones(self.hidden_size), None


def stand_in_weights(base: BaseDescription) -> _OnesSource:
    """A ``WeightSource`` of ones, for a base of which only the description is known."""
    return _OnesSource(base.linears, base.hidden_size)


def infer_base(config: Mapping[str, Any], shapes: Mapping[str, Shape], base_model: str) -> BaseDescription:
    """The smallest base that an artifact could be for.

    Args:
        config: the parsed ``adapter_config.json``.
        shapes: tensor name → shape.
        base_model: what the artifact names as its base.
    """
    widths = _infer_widths(shapes)
    hidden_size = _infer_hidden_size(config, shapes, widths)
    num_layers, num_kv_heads, head_dim = _infer_attention(config, shapes)
    # VeRA's modules share one A, which is as wide as the widest.
    shared_in = _first(shapes, "base_model.vera_A", 1) or hidden_size
    linears = {name: (d_in or shared_in, d_out or hidden_size) for name, (d_in, d_out) in widths.items()}
    modules = {
        path: (Part(Site(layer, name), range(linears[name][1])),)
        for path, layer, name, _, _ in _parts(shapes)
    }
    stacks, stacked = _infer_stacks(config, shapes)
    linears |= stacked
    vocab_size = _infer_vocab_size(shapes)
    encoder = next((family for word, family in _ENCODERS.items() if any(word in name for name in shapes)), "")
    model_type = str(config.get("model_type", encoder or "llama"))
    places = places_of(model_type)
    is_encoder = bool(encoder) or places.is_normed
    # AdapterHub leaves it out where it saved an encoder without a head.
    is_bare = places.is_normed and not any(name.startswith(places.prefix) for name in shapes)
    if is_encoder:
        modules |= {path: (Part(POOLER, range(hidden_size)),) for path in _POOLERS}
    return BaseDescription(
        model_type=model_type,
        prefix="" if is_bare else places.prefix,
        names=frozenset([base_model]),
        digest="",
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        linears=linears,
        modules={
            **modules,
            "model.embed_tokens": (Part(EMBEDDING, range(vocab_size)),),
            "lm_head": (Part(HEAD, range(vocab_size)),),
        },
        stacks=stacks,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        # Of AdapterHub's; PEFT's prompts are as wide as the hidden size, or refused.
        embedding_size=_first(shapes, ".prompt_embedding.weight", 1) or _coupled(shapes) or hidden_size,
        kind=TaskKind.EMBED if is_encoder else TaskKind.GENERATE,
        has_pooler=is_encoder,
        pooler_eps=1e-5 if model_type == "modernbert" else None,
        weights=_OnesSource(linears, hidden_size),
    )


def _parts(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, int, str, str, Shape]]:
    """Module path, layer, site name, rest of the name and shape of each tensor that belongs to a linear."""
    for tensor, shape in shapes.items():
        if _STACK.match(tensor) is not None:
            continue
        match, prefix = _LINEAR.match(tensor), "model."
        if match is None:
            match, prefix = _OTHER_LINEAR.match(tensor), ""
        if match is not None:
            # AdapterHub's modules continue with the adapter's own name.
            part = re.sub(r"^loras\.[^.]+\.", "", match["part"])
            name = re.sub(r"^(?:self_attn|mlp)\.", "", match["name"])
            if part != match["part"]:
                name = _SITES.get(name.rpartition(".")[2], name)
            name = ROUTER if name in _ROUTERS else name
            yield f"{prefix}{match['module']}", int(match["layer"]), name, part, shape


def _infer_stacks(
    config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> tuple[dict[str, ExpertStack], dict[str, tuple[int, int]]]:
    """The modules that are all experts of a layer, and the linears of the first expert."""
    found: dict[str, dict[str, dict[str, Shape]]] = {}
    layers: dict[str, int] = {}
    for tensor, shape in shapes.items():
        match = _STACK.match(tensor)
        if match is not None and len(shape) == 2:
            layers[match["module"]] = int(match["layer"])
            of_wrapper = found.setdefault(match["module"], {}).setdefault(match["wrappers"], {})
            of_wrapper[match["part"]] = shape
    try:
        lora = parse_lora_config(config) if found else None
    except AdapterError:
        lora = None  # it is refused for that
    stacks: dict[str, ExpertStack] = {}
    linears: dict[str, tuple[int, int]] = {}
    if lora is None:
        return stacks, linears
    for module, wrappers in found.items():
        chosen = [name for name in _STACKED if lora.selects_parameter(f"{module}.{name}")]
        num = 1
        for name, wrapper in zip(reversed(chosen), sorted(wrappers), strict=False):
            a, b = (wrappers[wrapper].get(f"lora_{part}.weight", (1, 1)) for part in "AB")
            num = max(1, a[0] // lora.rank_of(f"{module}.{name}"))
            linears[expert_linear(0, name)] = a[1], b[0]
        stacks[module] = ExpertStack(layers[module], num, {name: (name,) for name in chosen})
    return stacks, linears


def _infer_widths(shapes: Mapping[str, Shape]) -> dict[str, tuple[int | None, int | None]]:
    """Site name → input and output features, None if unknown."""
    widths: dict[str, tuple[int | None, int | None]] = {}
    for _, _, name, part, shape in _parts(shapes):
        known_in, known_out = widths.get(name, (None, None))
        if part == _IA3 and len(shape) == 2:
            at_in, at_out = (1, None) if shape[0] == 1 else (None, 0)
        else:
            at_in, at_out = _WIDTHS.get(part, (None, None))
        d_in = shape[at_in] if at_in is not None and at_in < len(shape) else None
        d_out = shape[at_out] if at_out is not None and at_out < len(shape) else None
        widths[name] = (known_in or d_in, known_out or d_out)
    return widths


def _infer_hidden_size(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    widths: Mapping[str, tuple[int | None, int | None]],
) -> int:
    """D: recorded, or what feeds the attention, or a row of an embedding; 1 if unknown."""
    recorded = config.get("hidden_size")
    if type(recorded) is int and recorded > 0:
        return recorded
    fed = (
        widths[name][0] for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "up_proj") if name in widths
    )
    made = (widths[name][1] for name in ("o_proj", "down_proj") if name in widths)
    rows = (
        _first(shapes, "prompt_embeddings", 1),
        _first(shapes, "trainable_tokens_delta", 1),
        _first(shapes, "lora_embedding_B", 0),
        _first(shapes, "lm_head.weight", 1),
        _first(shapes, "lm_head.lora_A.weight", 1),
        *(_first(shapes, f"{name}.weight", 1) for name in _HEADS),
    )
    narrowest = min((d_in for d_in, _ in widths.values() if d_in), default=None)
    return next((width for width in (*fed, *made, *rows, narrowest) if width), _UNKNOWN_WIDTH)


def _infer_vocab_size(shapes: Mapping[str, Shape]) -> int:
    """V, if the embedding or the head is adapted whole."""
    found = (
        _first(shapes, "lora_embedding_A", 1),
        _first(shapes, "lm_head.weight", 0),
        _first(shapes, "lm_head.lora_B.weight", 0),
    )
    return next((size for size in found if size), _UNKNOWN_VOCAB_SIZE)


def _infer_attention(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    """L, Hkv and K, as far as layers in names and a prefix's width reveal them."""
    layers = [int(match[1]) for name in shapes if (match := _LAYER.search(name))]
    if adapterhub_format.is_adapterhub(config):
        inner_configs = _inner_configs(config)
        layers += [layer for inner in inner_configs for layer in _left_out(inner) if 0 <= layer < 4096]
        prefix = next((each for each in inner_configs if each.get("architecture") == "prefix_tuning"), {})
        columns = _first(shapes, ".control_trans.2.weight", 0) or _flat_columns(prefix, shapes)
        num_layers = max(layers, default=0) + 1
        return num_layers, 1, columns // (2 * num_layers)
    recorded = [config.get(key) for key in ("num_layers", "token_dim", "num_attention_heads")]
    counts = [value for value in recorded if type(value) is int and value > 0]
    if len(counts) == len(recorded):
        num_layers, width, heads = counts
        return num_layers, heads, width // heads
    return max(layers, default=0) + 1, 1, 1


def _inner_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """AdapterHub's own: one, or a union's."""
    inner = config["config"]
    configs = inner.get("configs")
    return [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else [inner]


def _coupled(shapes: Mapping[str, Shape]) -> int:
    """E, of which an invertible adapter has two halves; 0 without one."""
    halves = [shape for name, shape in shapes.items() if re.search(r"\.[FG]\.2\.bias$", name)]
    return sum(math.prod(shape) for shape in halves)


def _left_out(inner: Mapping[str, Any]) -> list[int]:
    """Layers that have no tensors, but exist; a prefix has no tensors of single layers at all."""
    leave_out = inner.get("leave_out")
    if inner.get("architecture") == "prefix_tuning" or not isinstance(leave_out, list):
        return []
    return [layer for layer in leave_out if type(layer) is int]


def _flat_columns(inner: Mapping[str, Any], shapes: Mapping[str, Shape]) -> int:
    count = inner.get("prefix_length", 30)
    size = _first(shapes, ".control_trans", 0) or 2
    return size // count if type(count) is int and count > 0 else size


def _first(shapes: Mapping[str, Shape], ending: str, axis: int) -> int | None:
    """Length along ``axis`` of the first tensor whose name ends so."""
    found = (shape for name, shape in shapes.items() if name.endswith(ending) and axis < len(shape))
    return next((shape[axis] for shape in found if math.prod(shape)), None)
