"""From an adapter's deltas to its record, and what the kernels cannot run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    Gate,
    HeadRows,
    HeadWeight,
    InputScale,
    LoweredAdapter,
    LowRank,
    PrefixGate,
    TextEnds,
)
from manyhats.adapters.sites import EMBEDDING, HEAD, Site
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.layout import PREFIX, GroupPlace, LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.packed import PackedAdapter, RecordWriter
from manyhats.engine.backends.cuda.record import (
    ACTIVATIONS,
    EVERY_ROW,
    BottleneckWord,
    EmbeddingWord,
    HeadWord,
    LinearWord,
    PrefixWord,
    Source,
)
from manyhats.engine.errors import ModelError

_LOW_RANK = "low-rank delta"
_AFFINE = "scale and offset"
_GATE = "gate"

_SOURCES: Mapping[BottleneckInput | None, Source] = {
    None: Source.NOTHING,
    BottleneckInput.OUTPUT: Source.OUTPUT,
    BottleneckInput.SUM: Source.SUM,
    BottleneckInput.RESIDUAL: Source.RESIDUAL,
    BottleneckInput.NORMED: Source.NORMED,
}


def pack_adapter(
    adapter: LoweredAdapter, layout: RecordLayout, largest: LargestSizes, *, pinned: bool
) -> PackedAdapter:
    """Lays out an adapter.

    Raises:
        ModelError: the kernels cannot run one of its deltas.
    """
    packer = _Packer(layout, largest)
    for delta in adapter.deltas:
        packer.add(delta)
    return packer.packed(adapter.vocab_size, pinned=pinned)


class _Packer:
    """Collects an adapter's deltas; nothing is copied before all are known."""

    def __init__(self, layout: RecordLayout, largest: LargestSizes) -> None:
        self._layout = layout
        self._largest = largest
        self._writer = RecordWriter(layout.num_words)
        self._taken: set[tuple[int, str]] = set()
        self._input_scales: dict[tuple[int, str], list[InputScale]] = {}
        self._gated: list[tuple[int, LowRank | Affine]] = []
        self._of_experts: dict[int, dict[tuple[int, int], LowRank]] = {}
        self._acting = Acting()

    def add(self, delta: Delta) -> None:
        """Notes what a delta does."""
        match delta:
            case LowRank(site=site) if site == HEAD:
                self._low_rank(self._layout.head_low_rank, delta)
                self._acts(Acting(head_rank=delta.rank))
            case LowRank() if self._layout.is_of_expert(delta.site):
                self._expert(delta)
            case LowRank():
                self._low_rank(self._linear(delta.site), delta)
                self._acts(Acting(rank=delta.rank, outputs=self._groups(delta.site)))
            case Affine():
                self._affine(self._linear(delta.site), delta)
            case InputScale():
                self._input_scale(delta)
            case Bottleneck():
                self._bottleneck(delta)
            case EmbeddingLowRank():
                self._embedding_low_rank(delta)
            case EmbeddingRows():
                self._embedding_rows(delta)
            case HeadRows():
                self._head_rows(delta)
            case HeadWeight():
                self._head_weight(delta)
            case PrefixGate():
                self._prefix_gate(delta)

    def packed(self, vocab_size: int | None, *, pinned: bool) -> PackedAdapter:
        """Copies the numbers."""
        for (layer, group), scales in self._input_scales.items():
            self._enter_input_scales(self._layout.group(layer, group), scales)
        for at, delta in self._gated:
            self._linear_gate(at, delta)
        for layer, deltas in self._of_experts.items():
            experts = self._layout.architecture.blocks[layer].feed_forward.experts
            assert experts is not None
            self._writer.experts(self._layout.expert_table(layer), experts.num, deltas)
        return self._writer.packed(self._acting, vocab_size, pinned=pinned)

    def _low_rank(self, at: int, delta: LowRank) -> None:
        self._take(at, _LOW_RANK, delta.site)
        _check_size(delta.rank, self._largest.rank, f"{delta.site}: its rank")
        self._writer.matrix(at + LinearWord.A, delta.a)
        self._writer.matrix(at + LinearWord.B, delta.b.T)
        self._writer.set(at, {LinearWord.RANK: delta.rank, LinearWord.SCALE: float(delta.scale)})
        self._gated.append((at, delta))

    def _affine(self, at: int, delta: Affine) -> None:
        self._take(at, _AFFINE, delta.site)
        if delta.scale is not None:
            self._writer.vector(at + LinearWord.FACTORS, delta.scale)
        if delta.offset is not None:
            self._writer.vector(at + LinearWord.OFFSETS, delta.offset)
        self._gated.append((at, delta))
        self._acts(Acting(outputs=self._groups(delta.site)))

    def _linear_gate(self, at: int, delta: LowRank | Affine) -> None:
        """The gate of the only delta of a linear: no method or composition has another one beside it."""
        if delta.gate is None:
            return
        if {(at, _LOW_RANK), (at, _AFFINE)} <= self._taken or delta.site == HEAD:
            raise ModelError(f"{delta.site}: the CUDA kernels do not know a gate there")
        self._gate(at + LinearWord.GATE, delta.gate, self._layout.group_of[delta.site.name])

    def _gate(self, word: int, gate: Gate, place: str) -> None:
        self._writer.gate(word, gate.weight[0], gate.bias[0])
        self._acts(Acting(gates=frozenset((place,))))

    def _prefix_gate(self, delta: PrefixGate) -> None:
        at, gate = self._layout.prefix(delta.site.layer), delta.gate
        self._take(at, _GATE, delta.site)
        self._writer.gate(at + PrefixWord.KEYS, gate.weight[0], gate.bias[0])
        self._writer.gate(at + PrefixWord.VALUES, gate.weight[-1], gate.bias[-1])
        self._acts(Acting(gates=frozenset((PREFIX,))))

    def _expert(self, delta: LowRank) -> None:
        """An expert's linear, which no format gives a gate."""
        expert, member = self._layout.expert_of(delta.site)
        _check_size(delta.rank, self._largest.rank, f"{delta.site}: its rank")
        own = self._of_experts.setdefault(delta.site.layer, {})
        if (expert, member) in own:
            raise ModelError(f"{delta.site}: one {_LOW_RANK} a site, not two")
        own[expert, member] = delta
        self._acts(Acting(expert_rank=delta.rank))

    def _input_scale(self, delta: InputScale) -> None:
        self._take(self._linear(delta.site), "scale of the input", delta.site)
        group, _ = self._layout.input_of(delta.site)
        self._input_scales.setdefault((delta.site.layer, group), []).append(delta)

    def _enter_input_scales(self, place: GroupPlace, scales: Sequence[InputScale]) -> None:
        """An input is rescaled in place if all that read it rescale it alike."""
        first, *others = scales
        _, readers = self._layout.input_of(first.site)
        is_same = all(torch.equal(first.scale, each.scale) for each in others)
        has_low_rank = any((self._layout.linear(each.site), _LOW_RANK) in self._taken for each in scales)
        if is_same and not has_low_rank and {each.site.name for each in scales} == readers:
            self._writer.vector(place.input_scale, first.scale)
            self._acts(Acting(inputs=frozenset((place.name,))))
            return
        for each in scales:
            self._writer.vector(self._layout.linear(each.site) + LinearWord.INPUT, each.scale)
            self._acts(Acting(scaled=frozenset((each.site.name,))))

    def _bottleneck(self, delta: Bottleneck) -> None:
        site, size = delta.site, int(delta.down.shape[0])
        self._check_bottleneck(delta)
        at = self._layout.place(site).word
        self._take(at, "bottleneck", site)
        self._writer.matrix(at + BottleneckWord.DOWN, delta.down)
        self._writer.matrix(at + BottleneckWord.UP, delta.up.T)
        self._writer.vector(at + BottleneckWord.DOWN_BIAS, delta.down_bias)
        self._writer.vector(at + BottleneckWord.UP_BIAS, delta.up_bias)
        self._writer.vector(at + BottleneckWord.SCALE, delta.scale.expand(delta.up.shape[0]))
        if delta.norm_before is not None:
            self._writer.norm(at + BottleneckWord.BEFORE_WEIGHT, delta.norm_before)
        if delta.norm_after is not None:
            self._writer.norm(at + BottleneckWord.AFTER_WEIGHT, delta.norm_after)
        self._writer.set(at, _numbers_of(delta))
        if delta.gate is not None:
            self._gate(at + BottleneckWord.GATE, delta.gate, site.name)
        places, none = frozenset((site.name,)), frozenset[str]()
        self._acts(
            Acting(
                bottleneck=size,
                sublayers=places,
                norms_skipped=places if delta.skips_norm else none,
                ends=none if delta.ends is None else places,
            )
        )

    def _check_bottleneck(self, delta: Bottleneck) -> None:
        site = delta.site
        if not self._layout.has_place(site):
            raise ModelError(f"{site}: the base has no such place")
        if delta.activation not in ACTIVATIONS:
            raise ModelError(f"{site}: the CUDA kernels do not know the activation {delta.activation!r}")
        reads_normed = BottleneckInput.NORMED in (delta.input, delta.norm_residual) or delta.carry_normed
        if reads_normed and not self._layout.has_stream_norm(site):
            raise ModelError(f"{site}: reads a norm of the stream, which the base does not have there")
        _check_size(int(delta.down.shape[0]), self._largest.bottleneck, f"{site}: its size")

    def _embedding_low_rank(self, delta: EmbeddingLowRank) -> None:
        at = self._layout.embedding
        self._take(at, _LOW_RANK, EMBEDDING)
        self._writer.matrix(at + EmbeddingWord.A, delta.a)
        self._writer.matrix(at + EmbeddingWord.B, delta.b.T)
        num_tokens, rank = delta.a.shape
        self._writer.set(
            at,
            {
                EmbeddingWord.RANK: rank,
                EmbeddingWord.SCALE: float(delta.scale),
                EmbeddingWord.NUM_TOKENS: num_tokens,
            },
        )
        self._acts(Acting(changes_embeddings=True))

    def _embedding_rows(self, delta: EmbeddingRows) -> None:
        at = self._layout.embedding
        self._take(at, "set of rows", EMBEDDING)
        ids, order = delta.ids.sort()
        self._writer.integers(at + EmbeddingWord.IDS, ids)
        self._writer.matrix(at + EmbeddingWord.ROWS, delta.rows[order])
        self._writer.set(at, {EmbeddingWord.NUM_ROWS: ids.numel()})
        self._acts(Acting(changes_embeddings=True))

    def _head_rows(self, delta: HeadRows) -> None:
        at = self._layout.head_rows
        self._take(at, "set of rows", HEAD)
        self._writer.integers(at + HeadWord.IDS, delta.ids)
        self._head_matrix(at, delta.rows, delta.bias)
        self._acts(Acting(head_rows=delta.ids.numel()))

    def _head_weight(self, delta: HeadWeight) -> None:
        at = self._layout.head_weight
        self._take(at, "weight", HEAD)
        self._head_matrix(at, delta.weight, delta.bias)
        self._acts(Acting(head_weight=int(delta.weight.shape[0])))

    def _head_matrix(self, at: int, weight: Tensor, bias: Tensor | None) -> None:
        self._writer.matrix(at + HeadWord.ROWS, weight)
        if bias is not None:
            self._writer.vector(at + HeadWord.BIAS, bias)
        self._writer.set(at, {HeadWord.NUM_ROWS: int(weight.shape[0])})

    def _linear(self, site: Site) -> int:
        if not self._layout.has_linear(site):
            raise ModelError(f"{site}: the CUDA kernels run no adapters there")
        return self._layout.linear(site)

    def _groups(self, site: Site) -> frozenset[str]:
        return frozenset((self._layout.group_of[site.name],))

    def _acts(self, more: Acting) -> None:
        self._acting = Acting.most((self._acting, more))

    def _take(self, at: int, what: str, site: Site) -> None:
        if (at, what) in self._taken:
            raise ModelError(f"{site}: one {what} a site, not two")
        self._taken.add((at, what))


def _numbers_of(delta: Bottleneck) -> Mapping[IntEnum, int | float]:
    """The words that are no addresses."""
    ends = delta.ends or TextEnds(EVERY_ROW, 0, is_split=False)
    return {
        BottleneckWord.SIZE: int(delta.down.shape[0]),
        BottleneckWord.ACTIVATION: ACTIVATIONS.index(delta.activation),
        BottleneckWord.INPUT: _SOURCES[delta.input],
        BottleneckWord.NORM_RESIDUAL: _SOURCES[delta.norm_residual],
        BottleneckWord.SKIPS_NORM: int(delta.skips_norm),
        BottleneckWord.KEEP: float(delta.keep),
        BottleneckWord.CARRY: float(delta.carry),
        BottleneckWord.CARRY_NORMED: float(delta.carry_normed),
        BottleneckWord.FIRST: ends.first,
        BottleneckWord.LAST: ends.last,
        BottleneckWord.IS_SPLIT: int(ends.is_split),
    }


def _check_size(size: int, largest: int, what: str) -> None:
    if size > largest:
        raise ModelError(f"{what} is {size}; workspaces are made for {largest}")
