"""From an adapter's deltas to its record, and what the kernels cannot run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
)
from manyhats.adapters.sites import EMBEDDING, HEAD, Site
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.layout import GroupPlace, LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.packed import PackedAdapter, RecordWriter
from manyhats.engine.backends.cuda.record import (
    ACTIVATIONS,
    BottleneckWord,
    EmbeddingWord,
    HeadWord,
    LinearWord,
    Source,
)
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import SUBLAYERS

_LOW_RANK = "low-rank delta"

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
        self._acting = Acting()

    def add(self, delta: Delta) -> None:
        """Notes what a delta does."""
        match delta:
            case LowRank(site=site) if site == HEAD:
                self._low_rank(self._layout.head_low_rank, delta)
                self._acts(Acting(head_rank=delta.rank))
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
                raise ModelError(f"{delta.site}: the CUDA kernels do not know gates of texts")

    def packed(self, vocab_size: int | None, *, pinned: bool) -> PackedAdapter:
        """Copies the numbers."""
        for (layer, group), scales in self._input_scales.items():
            self._enter_input_scale(self._layout.group(layer, group), scales)
        return self._writer.packed(self._acting, vocab_size, pinned=pinned)

    def _low_rank(self, at: int, delta: LowRank) -> None:
        self._take(at, _LOW_RANK, delta.site)
        _check_no_gate(delta.gate, delta.site)
        _check_size(delta.rank, self._largest.rank, f"{delta.site}: its rank")
        self._writer.matrix(at + LinearWord.A, delta.a)
        self._writer.matrix(at + LinearWord.B, delta.b.T)
        self._writer.set(at, {LinearWord.RANK: delta.rank, LinearWord.SCALE: float(delta.scale)})

    def _affine(self, at: int, delta: Affine) -> None:
        self._take(at, "scale and offset", delta.site)
        _check_no_gate(delta.gate, delta.site)
        if delta.scale is not None:
            self._writer.vector(at + LinearWord.FACTORS, delta.scale)
        if delta.offset is not None:
            self._writer.vector(at + LinearWord.OFFSETS, delta.offset)
        self._acts(Acting(outputs=self._groups(delta.site)))

    def _input_scale(self, delta: InputScale) -> None:
        self._take(self._linear(delta.site), "scale of the input", delta.site)
        group, _ = self._layout.input_of(delta.site)
        self._input_scales.setdefault((delta.site.layer, group), []).append(delta)

    def _enter_input_scale(self, place: GroupPlace, scales: Sequence[InputScale]) -> None:
        """An input is scaled in place, which all linears that read it see."""
        first, *others = scales
        _, readers = self._layout.input_of(first.site)
        is_same = all(torch.equal(first.scale, each.scale) for each in others)
        if {each.site.name for each in scales} != readers or not is_same:
            raise ModelError(
                f"{first.site}: the CUDA kernels scale the input of all linears that read it, or of none"
            )
        for each in scales:
            if (self._layout.linear(each.site), _LOW_RANK) in self._taken:
                raise ModelError(f"{each.site}: a scale of the input and a low-rank delta exclude each other")
        self._writer.vector(place.input_scale, first.scale)
        self._acts(Acting(inputs=frozenset((place.name,))))

    def _bottleneck(self, delta: Bottleneck) -> None:
        site, size = delta.site, int(delta.down.shape[0])
        self._check_bottleneck(delta)
        at = self._layout.sublayer(site).word
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
        self._writer.set(
            at,
            {
                BottleneckWord.SIZE: size,
                BottleneckWord.ACTIVATION: ACTIVATIONS.index(delta.activation),
                BottleneckWord.INPUT: _SOURCES[delta.input],
                BottleneckWord.NORM_RESIDUAL: _SOURCES[delta.norm_residual],
                BottleneckWord.SKIPS_NORM: int(delta.skips_norm),
                BottleneckWord.KEEP: float(delta.keep),
                BottleneckWord.CARRY: float(delta.carry),
                BottleneckWord.CARRY_NORMED: float(delta.carry_normed),
            },
        )
        places = frozenset((site.name,))
        skipped = places if delta.skips_norm else frozenset[str]()
        self._acts(Acting(bottleneck=size, sublayers=places, norms_skipped=skipped))

    def _check_bottleneck(self, delta: Bottleneck) -> None:
        site = delta.site
        if site.name not in SUBLAYERS:
            raise ModelError(f"{site}: the CUDA kernels run bottlenecks at {' and '.join(SUBLAYERS)} only")
        _check_no_gate(delta.gate, site)
        if delta.ends is not None:
            raise ModelError(f"{site}: the CUDA kernels do not know bottlenecks at the ends of texts")
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
        if site.layer < 0 or site.name not in self._layout.group_of:
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


def _check_no_gate(gate: Gate | None, site: Site) -> None:
    if gate is not None:
        raise ModelError(f"{site}: the CUDA kernels do not know gates of texts")


def _check_size(size: int, largest: int, what: str) -> None:
    if size > largest:
        raise ModelError(f"{what} is {size}; workspaces are made for {largest}")
