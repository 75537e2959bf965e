"""Where a family's files keep a model's tensors, apart from what is computed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from manyhats.engine.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored matrix: the linears whose rows it holds, in order."""

    members: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Paths of modules as Hugging Face names them; a tensor's name is its module's path and ``.weight`` or ``.bias``.

    Attributes:
        modules: path of a matrix below its layer → what it holds.
        norms: name of a block's norm → its path below the layer.
        norm_offset: added to a stored norm weight to get its factor.
        stores_embedding_scale: whether the embedding's multiplier is rounded to the embedding's dtype.
        embedding, final_norm, head: paths.
        layer: path of layer ``{layer}``.
        ignored: endings of the names of tensors that follow from the config.
    """

    modules: Mapping[str, Stored]
    norms: Mapping[str, str]
    norm_offset: float = 0.0
    stores_embedding_scale: bool = False
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def path(self, layer: int, below: str) -> str:
        """The path of a module ``below`` a layer, such as ``model.layers.0.self_attn.q_proj``."""
        return f"{self.layer.format(layer=layer)}.{below}"


@dataclass(frozen=True, slots=True)
class Family:
    """One model of a family: what it computes, and where its files keep the weights."""

    architecture: Architecture
    layout: Layout

    def in_dtype(self, dtype: torch.dtype) -> Family:
        """The same for an embedding of that dtype."""
        if not self.layout.stores_embedding_scale:
            return self
        embedding = self.architecture.embedding
        rounded = replace(embedding, scale=float(torch.tensor(embedding.scale).to(dtype)))
        return replace(self, architecture=replace(self.architecture, embedding=rounded))
