"""Where AdapterHub's adapters lie in the layers of a family, and what the modules that hold them are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from manyhats.adapters.errors import AdapterUnsupportedError, shown
from manyhats.adapters.sites import BaseDescription


@dataclass(frozen=True, slots=True)
class Places:
    """A family's.

    Attributes:
        layer: path of a layer, or of a set of weights that layers share, below the prefix of the base's modules, up to
            its number.
        attention: the module of a layer that holds the adapters on the attention's output.
        feed_forward: the same for the feed-forward.
        self_attention: the module of a layer that holds the prefixes' gates.
        self_prefix: what the library calls a prefix of that module.
        reft: the module of a layer that holds ReFT.
        is_normed: whether they lie before a norm of the stream: of the sum of sub-layer and residual.
        is_swapped: whether the library takes the attention's output for the residual, and the other way round.
        prefix: of the base's modules, where only its ``model_type`` is known.
    """

    layer: str = "layers"
    attention: str = "attention_adapters"
    feed_forward: str = "output_adapters"
    self_attention: str = "self_attn"
    self_prefix: str = "self_prefix"
    reft: str = "reft_layer"
    is_normed: bool = False
    is_swapped: bool = False
    prefix: str = "model."

    def module(self, layer: int, sub_layer: str) -> str:
        """The module that holds the adapters on a sub-layer's output."""
        holder = self.attention if sub_layer == "attention" else self.feed_forward
        return f"{self.layer}.{layer}.{holder}"

    def split(self, plain: str) -> tuple[int, str] | None:
        """``layers.3.mlp.x`` as (3, ``mlp.x``); None for what lies outside the layers."""
        match = _pattern(self.layer).fullmatch(plain)
        return None if match is None else (int(match[1]), match[2])


@cache
def _pattern(layer: str) -> re.Pattern[str]:
    return re.compile(re.escape(layer) + r"\.(0|[1-9]\d{0,5})\.(.+)")


_LLAMA = Places()
_GPT2 = Places("h", prefix="transformer.")
_BERT = Places(
    "encoder.layer", "attention.output", "output", "attention.self", is_normed=True, prefix="bert."
)
_ALBERT = Places(
    "encoder.albert_layer_groups",
    "albert_layers.0.attention.attention_adapters",
    "albert_layers.0.output_adapters",
    "albert_layers.0.attention",
    reft="albert_layers.0.reft_layer",
    is_normed=True,
    is_swapped=True,
    prefix="albert.",
)
_ROBERTA = replace(_BERT, prefix="roberta.")
_PLACES: Mapping[str, Places] = MappingProxyType(
    {
        **dict.fromkeys(("gpt2", "gptj"), _GPT2),
        "albert": _ALBERT,
        "bert": _BERT,
        "electra": replace(_BERT, prefix="electra."),
        **dict.fromkeys(("roberta", "xlm-roberta"), _ROBERTA),
        "distilbert": Places(
            "transformer.layer",
            self_attention="attention",
            self_prefix="self",
            is_normed=True,
            prefix="distilbert.",
        ),
    }
)

ENCODERS = tuple(sorted(model_type for model_type, places in _PLACES.items() if places.is_normed))
"""The encoders that the library knows."""


def check_encoder(base: BaseDescription, key: str, what: str) -> None:
    """Refuse what is only served on encoders.

    Args:
        base: the resident one.
        key: the config's field that asks for it.
        what: how the error names it, and why decoders cannot have it.

    Raises:
        AdapterUnsupportedError: the base is none of them.
    """
    if base.model_type not in ENCODERS:
        raise AdapterUnsupportedError(
            key,
            f"asks for {what}; it is served on {', '.join(ENCODERS)}, and not on {shown(base.model_type)}",
        )


def places_of(model_type: str) -> Places:
    """Those of a family by its ``model_type``; Llama's unless another is known."""
    return _PLACES.get(model_type, _LLAMA)
