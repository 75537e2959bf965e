"""Where an adapter may act on the base model: named sites, and what validation must know of a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place in the decoder's forward: a linear of one layer, such as layer 3's ``q_proj``.

    ``layer`` counts from 0; it is −1 for places outside the layers (``embed_tokens``, ``lm_head``).
    """

    layer: int
    name: str

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"layer {self.layer} {self.name}"


@dataclass(frozen=True, slots=True)
class BaseDescription:
    """What an adapter is checked against: names, shapes and module paths of the resident base.

    Attributes:
        model_type: Hugging Face ``model_type``, such as ``llama``.
        names: every name this base is known by (alias, hub id, ``--base-name``).
        digest: identifies weights and quantization; part of every KV block's key.
        num_layers: L.
        hidden_size: D.
        vocab_size: V.
        linears: site name → (in features, out features); the same in every layer.
        modules: Hugging Face module path (``model.layers.0.self_attn.q_proj``) → site.
    """

    model_type: str
    names: frozenset[str]
    digest: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    linears: Mapping[str, tuple[int, int]]
    modules: Mapping[str, Site]
