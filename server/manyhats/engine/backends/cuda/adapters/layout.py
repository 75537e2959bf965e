"""Where in a slot's record the words of each place of a base are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from manyhats.adapters.sites import HEAD, ROUTER, Site
from manyhats.engine.backends.cuda.record import BottleneckWord, EmbeddingWord, HeadWord, LinearWord
from manyhats.engine.model.architecture import SUBLAYERS, Architecture, Group

MAX_MEMBERS = 3
"""Linears of a group that the kernels take side by side."""


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """A group of linears of one layer.

    Attributes:
        name: of the group.
        input_scale: the word with the address of its input's factors.
        members: the first word of its first member; the others' follow.
        d_in: input features, K.
        sizes: output features of each member.
    """

    name: str
    input_scale: int
    members: int
    d_in: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SublayerPlace:
    """A sub-layer of one layer: its name, and the first word of its bottleneck."""

    name: str
    word: int


@dataclass(frozen=True, slots=True)
class LargestSizes:
    """The largest rank and bottleneck that workspaces are made for."""

    rank: int
    bottleneck: int


@dataclass(frozen=True)
class RecordLayout:
    """The words of a record: each layer's groups and sub-layers, then embedding and output head.

    Attributes:
        architecture: of the base.
    """

    architecture: Architecture

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        """The groups of linears that any layer has, without mixtures."""
        found = self.architecture.shared_groups()
        return {name: group for name, group in found.items() if name != ROUTER}

    @cached_property
    def group_of(self) -> Mapping[str, str]:
        """Linear → its group."""
        return {name: group.name for group in self.groups.values() for name in group.names}

    @cached_property
    def _group_starts(self) -> Mapping[str, int]:
        starts, end = {}, 0
        for name, group in self.groups.items():
            starts[name] = end
            end += 1 + len(group.members) * len(LinearWord)
        return starts

    @cached_property
    def _num_linear_words(self) -> int:
        return sum(1 + len(group.members) * len(LinearWord) for group in self.groups.values())

    @cached_property
    def _layer_words(self) -> int:
        return self._num_linear_words + len(SUBLAYERS) * len(BottleneckWord)

    def group(self, layer: int, name: str) -> GroupPlace:
        """A group's place."""
        at, group = layer * self._layer_words + self._group_starts[name], self.groups[name]
        return GroupPlace(name, at, at + 1, group.d_in, tuple(member.d_out for member in group.members))

    def linear(self, site: Site) -> int:
        """The first word of a linear."""
        group = self.groups[self.group_of[site.name]]
        member = group.names.index(site.name)
        return self.group(site.layer, group.name).members + member * len(LinearWord)

    def sublayer(self, site: Site) -> SublayerPlace:
        """A sub-layer's place."""
        at = site.layer * self._layer_words + self._num_linear_words
        return SublayerPlace(site.name, at + SUBLAYERS.index(site.name) * len(BottleneckWord))

    def input_of(self, site: Site) -> tuple[str, frozenset[str]]:
        """What a linear reads: the group before which it is scaled, and the names of all linears that read it.

        In a parallel block with one norm that is the attention's group, and the feed-forward's reads the same.
        """
        block = self.architecture.blocks[site.layer]
        group = self.groups[self.group_of[site.name]]
        (before, _), (first, _) = block.attention_groups(), block.feed_forward_groups()
        is_shared = block.norm_before("attention") == block.norm_before("feed_forward")
        if block.is_parallel and is_shared and group.name in (before.name, first.name):
            return before.name, frozenset((*before.names, *first.names))
        return group.name, frozenset(group.names)

    def has_stream_norm(self, site: Site) -> bool:
        """Whether the base norms the stream behind a sub-layer."""
        block = self.architecture.blocks[site.layer]
        around = block.around_attention if site.name == "attention" else block.around_feed_forward
        return around.stream is not None

    @cached_property
    def head_inputs(self) -> int:
        """Values of a row that the output head reads; of an encoder, that leave it."""
        return self.architecture.read_size

    @cached_property
    def embedding(self) -> int:
        """The first word of the embedding."""
        return self.architecture.num_layers * self._layer_words

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
