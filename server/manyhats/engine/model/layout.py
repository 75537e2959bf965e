"""Where a family's files keep a model's tensors, apart from what is computed with them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from manyhats.adapters.sites import Rows
from manyhats.engine.model.architecture import Architecture, Block, linears_by_name


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored matrix: the linears whose rows it holds, in order.

    Attributes:
        members: the linears.
        rows: how they lie: one below the other in ``blocks``; by ``heads``, each head's queries, keys and values in
            turn; or by ``groups``, the queries of all heads that share keys, then these, then their values.
        is_transposed: whether a dense file has [in, out].
    """

    members: tuple[str, ...]
    rows: Literal["blocks", "heads", "groups"] = "blocks"
    is_transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Paths of modules as Hugging Face names them; a tensor's name is its module's path and ``.weight`` or ``.bias``.

    Attributes:
        modules: path of a matrix below its layer → what it holds; a layer has those whose linears it has.
        stacked: path below a layer of a tensor that some files have in place of matrices of ``modules`` → the paths of
            these, ``{expert}`` standing for the number of an expert: the tensor has one [out, in] matrix an expert,
            those of several paths one below the other. A path without that is another name of one.
        norms: name of a block's norm → its path below the layer.
        norm_offset: added to a stored norm weight to get its factor.
        stores_embedding_scale: whether the embedding's multiplier is rounded to the embedding's dtype.
        is_interleaved: whether the pairs that RoPE rotates are neighbours in files, rather than half a head apart.
        prefix: of all paths but the head's.
        other_prefixes: what files may have in its place.
        embedding, positions, token_types, embedding_norm, embedding_projection, head_projection, final_norm: paths
            below the prefix.
        pooler: path of what is in front of a task's classifier, after ``{prefix}`` where that is part of it.
        pooler_norm: path of the norm behind it.
        head: path of the output head.
        other_heads: what files may call it.
        layer: path of layer ``{layer}``, or of a set of weights that layers share, below the prefix.
        ignored: endings of the names of tensors that follow from the config.
        unused: beginnings of the names of tensors that serve another purpose, such as masked language modelling.
    """

    modules: Mapping[str, Stored]
    norms: Mapping[str, str]
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norm_offset: float = 0.0
    stores_embedding_scale: bool = False
    is_interleaved: bool = False
    prefix: str = "model."
    other_prefixes: tuple[str, ...] = ()
    embedding: str = "embed_tokens"
    positions: str = ""
    token_types: str = ""
    embedding_norm: str = ""
    embedding_projection: str = ""
    head_projection: str = ""
    final_norm: str = "norm"
    pooler: str = ""
    pooler_norm: str = ""
    head: str = "lm_head"
    other_heads: tuple[str, ...] = ()
    layer: str = "layers.{layer}"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    unused: tuple[str, ...] = ()

    def modules_of(self, block: Block) -> Mapping[str, Stored]:
        """The matrices that a layer has, by path below it."""
        names = linears_by_name(block)
        return {path: stored for path, stored in self.modules.items() if stored.members[0] in names}

    def path(self, layer: int, below: str) -> str:
        """The path of a module ``below`` a layer, such as ``model.layers.0.self_attn.q_proj``."""
        return f"{self.prefix}{self.layer.format(layer=layer)}.{below}"

    def outer(self, below: str) -> str:
        """The path of a module outside the layers, such as ``model.embed_tokens``."""
        return f"{self.prefix}{below}"

    @property
    def pooler_path(self) -> str:
        """The path of what is in front of a task's classifier; empty if files have none."""
        return self.pooler.format(prefix=self.prefix)

    def of_files(self, names: Collection[str]) -> Layout:
        """The same with the prefix, and the name of the head, that a checkpoint's tensors have; a pooler if they do."""
        prefixes = (self.prefix, *self.other_prefixes)
        prefix = next((each for each in prefixes if f"{each}{self.embedding}.weight" in names), self.prefix)
        heads = (self.head, *self.other_heads)
        head = next((each for each in heads if f"{each}.weight" in names), self.head)
        found = replace(self, prefix=prefix, head=head)
        parts = (found.pooler_path, *((found.pooler_norm,) if found.pooler_norm else ()))
        return found if all(f"{each}.weight" in names for each in parts) else replace(found, pooler="")


@dataclass(frozen=True, slots=True)
class Family:
    """One model of a family: what it computes, and where its files keep the weights."""

    architecture: Architecture
    layout: Layout

    def of_files(self, names: Collection[str]) -> Family:
        """The same with the paths that a checkpoint's tensors have."""
        return replace(self, layout=self.layout.of_files(names))

    def path(self, layer: int, below: str) -> str:
        """The path of a module ``below`` a layer, such as ``model.layers.0.self_attn.q_proj``."""
        return self.layout.path(self.architecture.set_of(layer), below)

    def rows_of(self, block: Block, stored: Stored) -> dict[str, Rows]:
        """Which rows of a stored matrix are whose, in the order in which a linear is computed."""
        rows = _stored_rows(block, stored)
        if (order := self.key_order) is not None:
            for name in rows.keys() & {"q_proj", "k_proj"}:
                own = rows[name]
                heads = range(0, len(own), len(order))
                rows[name] = tuple(own[head + index] for head in heads for index in order)
        return rows

    @property
    def key_order(self) -> tuple[int, ...] | None:
        """The order of a head's values, as indices of a file's; None if it is the same.

        It is that of layers without rotation too, where any would do.
        """
        blocks = self.architecture.blocks
        rotary_dim = max(block.attention.rotary_dim for block in blocks)
        if not self.layout.is_interleaved or not rotary_dim:
            return None
        return halves_first(rotary_dim, self.architecture.attention.head_dim)

    def in_dtype(self, dtype: torch.dtype) -> Family:
        """The same for an embedding of that dtype."""
        if not self.layout.stores_embedding_scale:
            return self
        embedding = self.architecture.embedding
        rounded = replace(embedding, scale=float(torch.tensor(embedding.scale).to(dtype)))
        return replace(self, architecture=replace(self.architecture, embedding=rounded))


def halves_first(rotary_dim: int, head_dim: int) -> tuple[int, ...]:
    """The order of a head's values in which the pairs to rotate, neighbours before, are half the rotated part apart."""
    return (*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, head_dim))


def _stored_rows(block: Block, stored: Stored) -> dict[str, Rows]:
    """The same as the file has them."""
    attention = block.attention
    linears = linears_by_name(block)
    sizes = {name: linears[name].d_out for name in stored.members}
    if stored.rows == "blocks":
        ends = list(itertools.accumulate(sizes.values()))
        return {name: range(end - sizes[name], end) for name, end in zip(stored.members, ends, strict=True)}
    num_groups = attention.num_heads if stored.rows == "heads" else attention.num_kv_heads
    counts = {name: sizes[name] // num_groups for name in stored.members}
    stride, start = sum(counts.values()), 0
    rows: dict[str, Rows] = {}
    for name, count in counts.items():
        firsts = range(start, num_groups * stride, stride)
        rows[name] = tuple(row for first in firsts for row in range(first, first + count))
        start += count
    return rows
