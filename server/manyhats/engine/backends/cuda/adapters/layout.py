"""Where in a slot's record the words of each place of a base are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from manyhats.adapters.sites import HEAD, PROJECTION, Site
from manyhats.engine.backends.cuda.record import (
    EXPERT_MEMBERS,
    BottleneckWord,
    EmbeddingWord,
    HeadWord,
    LinearWord,
    PrefixWord,
)
from manyhats.engine.model.architecture import COUPLINGS, SUBLAYERS, Architecture, Experts, Group, LinearShape

PREFIX = "prefix"
"""The place of what gates KV prefixes."""


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """A group of linears of one layer.

    Attributes:
        name: of the group.
        input_scale: the word with the address of its input's factors.
        members: the first word of its first member; the others' follow.
        d_in: input features, K.
        sizes: output features of each member.
        names: of the members.
        prefix: the first word of the layer's KV prefix, whose gates read what the group reads; None for other groups.
    """

    name: str
    input_scale: int
    members: int
    d_in: int
    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()
    prefix: int | None = None


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where a bottleneck acts on the stream: the place's name, the first word of its bottleneck, and D."""

    name: str
    word: int
    size: int


@dataclass(frozen=True, slots=True)
class LargestSizes:
    """The largest rank and bottleneck that workspaces are made for."""

    rank: int
    bottleneck: int


@dataclass(frozen=True)
class RecordLayout:
    """The words of a record: those of each layer, then those of places outside the layers.

    A layer has groups of linears, places of bottlenecks, a KV prefix and, with experts, the address of a table.

    Attributes:
        architecture: of the base.
    """

    architecture: Architecture

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        """The groups of linears, but for experts, that any layer has, and those outside the layers."""
        embedding, hidden_size = self.architecture.embedding, self.architecture.hidden_size
        if embedding.size == hidden_size:
            return self._layer_groups
        projection = LinearShape(PROJECTION.name, embedding.size, hidden_size, has_bias=False)
        return {**self._layer_groups, PROJECTION.name: Group(PROJECTION.name, (projection,))}

    @cached_property
    def _layer_groups(self) -> Mapping[str, Group]:
        return self.architecture.shared_groups()

    @cached_property
    def group_of(self) -> Mapping[str, str]:
        """Linear → its group."""
        return {name: group.name for group in self.groups.values() for name in group.names}

    @cached_property
    def _group_starts(self) -> Mapping[str, int]:
        """Counted from the layer's first word, or of those outside from their own."""
        starts, end = {}, 0
        for name, group in self._layer_groups.items():
            starts[name] = end
            end += _num_words(group)
        return {**starts, PROJECTION.name: self._outside}

    @cached_property
    def _num_linear_words(self) -> int:
        return sum(_num_words(group) for group in self._layer_groups.values())

    @cached_property
    def _layer_places(self) -> tuple[str, ...]:
        return tuple(name for name in self.architecture.stream_places() if name not in COUPLINGS)

    @cached_property
    def _prefix_word(self) -> int:
        return self._num_linear_words + len(self._layer_places) * len(BottleneckWord)

    @cached_property
    def _layer_words(self) -> int:
        return self._prefix_word + len(PrefixWord) + (self.experts is not None)

    @cached_property
    def experts(self) -> Experts | None:
        """Of the layers that are mixtures; None if none is."""
        found = (block.feed_forward.experts for block in self.architecture.blocks)
        return next((each for each in found if each is not None), None)

    def group(self, layer: int, name: str) -> GroupPlace:
        """A group's place; its layer is −1 outside the layers."""
        start, group = max(layer, 0) * self._layer_words, self.groups[name]
        at = start + self._group_starts[name]
        sizes = tuple(member.d_out for member in group.members)
        prefix = start + self._prefix_word if name == "qkv" else None
        return GroupPlace(name, at, at + 1, group.d_in, sizes, group.names, prefix)

    def linear(self, site: Site) -> int:
        """The first word of a linear."""
        group = self.groups[self.group_of[site.name]]
        member = group.names.index(site.name)
        return self.group(site.layer, group.name).members + member * len(LinearWord)

    def has_linear(self, site: Site) -> bool:
        """Whether the base has a linear, other than an expert's, there."""
        group = self.group_of.get(site.name)
        return group is not None and (site.layer < 0) == (group not in self._layer_groups)

    def place(self, site: Site) -> StreamPlace:
        """Where a bottleneck acts."""
        _, size = self.architecture.stream_places()[site.name]
        if site.name in COUPLINGS:
            at = self._couplings + COUPLINGS.index(site.name) * len(BottleneckWord)
            return StreamPlace(site.name, at, size)
        at = site.layer * self._layer_words + self._num_linear_words
        return StreamPlace(site.name, at + self._layer_places.index(site.name) * len(BottleneckWord), size)

    def has_place(self, site: Site) -> bool:
        """Whether bottlenecks act there."""
        is_known = site.name in self.architecture.stream_places()
        return is_known and (site.layer < 0) == (site.name in COUPLINGS)

    def prefix(self, layer: int) -> int:
        """The first word of a layer's KV prefix."""
        return layer * self._layer_words + self._prefix_word

    def is_of_expert(self, site: Site) -> bool:
        """Whether it is a linear of an expert that the base has."""
        if site.kind == site.name:
            return False
        experts = self.architecture.blocks[site.layer].feed_forward.experts
        return experts is not None and self.expert_of(site)[0] < experts.num

    def expert_of(self, site: Site) -> tuple[int, int]:
        """The expert of one of its linears, and the linear's place in the expert's entries."""
        _, expert, name = site.name.split(".")
        return int(expert), EXPERT_MEMBERS.index(name)

    def expert_table(self, layer: int) -> int:
        """The word with the address of a layer's table of experts."""
        return self.prefix(layer) + len(PrefixWord)

    def input_of(self, site: Site) -> tuple[str, frozenset[str]]:
        """What a linear reads: the group before which it is scaled, and the names of all linears that read it.

        In a parallel block with one norm that is the attention's group, and the feed-forward's reads the same.
        """
        group = self.groups[self.group_of[site.name]]
        if site.layer < 0:
            return group.name, frozenset(group.names)
        block = self.architecture.blocks[site.layer]
        (before, _), (first, _) = block.attention_groups(), block.feed_forward_groups()
        is_shared = block.norm_before("attention") == block.norm_before("feed_forward")
        if block.is_parallel and is_shared and group.name in (before.name, first.name):
            return before.name, frozenset((*before.names, *first.names))
        return group.name, frozenset(group.names)

    def has_stream_norm(self, site: Site) -> bool:
        """Whether the base norms the stream behind a sub-layer; elsewhere it norms none."""
        if site.name not in SUBLAYERS:
            return False
        block = self.architecture.blocks[site.layer]
        around = block.around_attention if site.name == "attention" else block.around_feed_forward
        return around.stream is not None

    @cached_property
    def head_inputs(self) -> int:
        """Values of a row that the output head reads; of an encoder, that leave it."""
        return self.architecture.read_size

    @cached_property
    def _outside(self) -> int:
        """The first word behind the layers'."""
        return self.architecture.num_layers * self._layer_words

    @cached_property
    def _couplings(self) -> int:
        outside = (group for name, group in self.groups.items() if name not in self._layer_groups)
        return self._outside + sum(_num_words(group) for group in outside)

    @cached_property
    def embedding(self) -> int:
        """The first word of the embedding."""
        num_couplings = sum(name in COUPLINGS for name in self.architecture.stream_places())
        return self._couplings + num_couplings * len(BottleneckWord)

    @cached_property
    def head_weight(self) -> int:
        """The first word of an output head that replaces the base's."""
        return self.embedding + len(EmbeddingWord)

    @cached_property
    def head_rows(self) -> int:
        """The first word of rows that replace the output head's."""
        return self.head_weight + len(HeadWord)

    @cached_property
    def head_low_rank(self) -> int:
        """The first word of the output head as a linear."""
        return self.head_rows + len(HeadWord)

    @cached_property
    def num_words(self) -> int:
        """Of a record."""
        return self.head_low_rank + len(LinearWord)

    def head(self, num_tokens: int) -> GroupPlace:
        """The output head, of so many tokens, as a group of one linear, whose input nothing scales."""
        return GroupPlace(HEAD.name, -1, self.head_low_rank, self.head_inputs, (num_tokens,))


def _num_words(group: Group) -> int:
    return 1 + len(group.members) * len(LinearWord)
