"""A decoder's forward as a program: the order of ``model.forward`` in the kernel's instructions."""

from __future__ import annotations

from torch import Tensor

from manyhats.adapters.sites import PROJECTION
from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.building import (
    BESIDE,
    EMBEDDED,
    FINAL,
    FINAL_HIDDEN,
    HIDDEN,
    LAST,
    LOGITS,
    MIXED,
    NORMED,
    NORMED_EMBEDDED,
    OUTPUT,
    STREAM,
    WIDE,
    Building,
)
from manyhats.engine.backends.cpu.head.logits import PackedHead
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.mixture import add_mixture
from manyhats.engine.backends.cpu.program import PackedNorm
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import COUPLINGS, Architecture, Attention, Block
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import BlockWeights, Linear, Weights

ACTIVATIONS = {
    "silu": col.SILU,
    "gelu_pytorch_tanh": col.GELU_TANH,
    "gelu": col.GELU,
    "relu": col.RELU,
}
"""The activations that the kernel knows, and their instructions."""


class Forward(Building):
    """The program of a decoder, and its packed weights.

    Attributes:
        first: the buffer that holds the tokens' vectors when it begins.
        num_outer_bytes: resident bytes of what lies outside the blocks, but embedding, head and norms.
        head: packed; None for an encoder.

    Raises:
        ModelError: the kernel does not know what a block computes.
    """

    def __init__(self, architecture: Architecture, weights: Weights, kernels: CpuKernels) -> None:
        super().__init__(architecture, kernels)
        self.num_outer_bytes = 0
        self._rotary = RotaryTables(architecture)
        self.first = self._enter(architecture, weights)
        norms = [
            _norms(block, of_block)
            for block, of_block in zip(architecture.blocks, weights.blocks, strict=True)
        ]
        befores = [of_block.get("attention_before") for of_block in norms]
        final = architecture.final_norm
        last = (
            None if final is None or weights.final_norm is None else PackedNorm.of(final, weights.final_norm)
        )
        hidden = self._begin(befores[0])
        for index, block in enumerate(architecture.blocks):
            following = (*befores, last)[index + 1]
            hidden = self._block(index, block, weights.blocks[index], norms[index], hidden, following)
        self._end(hidden, weights, architecture)

    def _end(self, hidden: int, weights: Weights, architecture: Architecture) -> None:
        """From the last block's output to the logits."""
        self._leave(hidden, FINAL_HIDDEN, HIDDEN, col.NUM_HIDDEN_ROWS, weights)
        self.head = None
        if architecture.head is None:
            return
        self._leave(hidden, FINAL, LAST, col.NUM_LOGIT_ROWS, weights)
        self.head = PackedHead(*self.kernels.pack_head(weights.head), architecture.head)
        self.product(self.head.fast or self.head.own, LAST, LOGITS, col.NUM_LOGIT_ROWS)
        self.sizes[LOGITS] = self.head.own.out_features
        if self.head.fast:
            self.program.refine(LAST, LOGITS, self.head.own)

    def _enter(self, architecture: Architecture, weights: Weights) -> int:
        """From the tokens' vectors to the stream, as ``model.forward.entered``; returns the buffer of the vectors."""
        embedding, norm = architecture.embedding, architecture.embedding.norm
        projection = weights.outer.get("embedding_projection")
        first = STREAM if projection is None else EMBEDDED
        summed = STREAM if norm is None else first
        if projection is not None and norm is None:
            self._outer(projection, EMBEDDED, STREAM, col.NUM_ROWS)
        if embedding.positions is not None and weights.positions is not None:
            self.program.locate(summed, self._table(weights.positions), embedding.positions.offset)
        if weights.token_types is not None:
            self.program.locate(summed, self._table(weights.token_types), which=col.TOKEN_TYPES)
        if norm is not None and weights.embedding_norm is not None:
            self.program.norm(summed, summed, PackedNorm.of(norm, weights.embedding_norm))
            for name in COUPLINGS:
                self.program.bottleneck(
                    summed, summed, embedding.size, self._layout.place_index(name), 0, None
                )
            self.program.scatter(NORMED_EMBEDDED, summed, embedding.size)
            if projection is not None:
                self._outer(projection, EMBEDDED, STREAM, col.NUM_ROWS, PROJECTION.name)
        return first

    def _table(self, table: Tensor) -> Tensor:
        table = table.float()
        self.num_outer_bytes += table.nbytes
        return table

    def _leave(self, hidden: int, between: int, target: int, rows: int, weights: Weights) -> None:
        """Copies some rows of the last block's normed output, as the head reads them."""
        projection, size = weights.outer.get("head_projection"), self.sizes[STREAM]
        if projection is None:
            self.program.gather(hidden, target, size, rows)
            return
        self.program.gather(hidden, between, size, rows)
        self._outer(projection, between, target, rows)

    def _outer(self, linear: Linear, source: int, target: int, rows: int, name: str = "") -> None:
        """A linear outside the blocks, and deltas if they are entered under a name."""
        packed = self.kernels.pack([linear])
        self.num_outer_bytes += packed.num_bytes
        self.need(source, packed.in_features)
        self.product(packed, source, target, rows)
        if name:
            self.deltas(name, 0, packed, source, target)

    def _begin(self, norm: PackedNorm | None) -> int:
        """Norms the stream as it begins, if the family does; returns the buffer of the first block's input."""
        if norm is None:
            return STREAM
        self.program.norm(STREAM, NORMED, norm)
        return NORMED

    def _block(
        self,
        layer: int,
        block: Block,
        weights: BlockWeights,
        norms: dict[str, PackedNorm],
        hidden: int,
        following: PackedNorm | None,
    ) -> int:
        """One block, whose input is in the buffer ``hidden``; returns the buffer of the next block's input."""
        linears = {group.name: [weights.linears[name] for name in group.names] for group in block.groups()}
        early = self._beside(norms.get("feed_forward_before"), hidden) if block.is_parallel else None
        self._attention(layer, block.attention, linears, norms, hidden)
        between = None if block.is_parallel else norms.get("feed_forward_before")
        hidden = self._join("attention", layer, block.residual_scale, norms, between)
        self._feed_forward(layer, block, linears, hidden if early is None else early)
        return self._join("feed_forward", layer, block.residual_scale, norms, following)

    def _beside(self, norm: PackedNorm | None, hidden: int) -> int:
        """The buffer of a feed-forward's input that is read beside the attention, whose input is ``hidden``."""
        if norm is None:
            return hidden
        self.sizes[BESIDE] = self.sizes[STREAM]
        self.program.norm(STREAM, BESIDE, norm)
        return BESIDE

    def _attention(
        self,
        layer: int,
        attention: Attention,
        linears: dict[str, list[Linear]],
        norms: dict[str, PackedNorm],
        hidden: int,
    ) -> None:
        size = self.linear("qkv", layer, linears["qkv"], hidden, WIDE)
        if "query" in norms and "key" in norms:
            queries, keys = (norms["query"], attention.query_size), (norms["key"], attention.key_size)
            self.program.norm_heads(WIDE, size, queries, keys)
        angles = self._rotary.tables[attention.rope]
        self.program.rotate(WIDE, size, layer, angles, attention.num_heads)
        if self._gates:
            self.program.gate_prefix(hidden, self.sizes[STREAM], layer)
        sizes = size, attention.query_size
        self.program.attention(
            WIDE,
            MIXED,
            sizes,
            layer,
            attention.scale,
            attention.window,
            attention.softcap,
            attention.sees_all,
        )
        self.linear("o", layer, linears["o"], MIXED, OUTPUT)

    def _feed_forward(self, layer: int, block: Block, linears: dict[str, list[Linear]], hidden: int) -> None:
        feed_forward = block.feed_forward
        if feed_forward.activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ModelError(
                f"the CPU kernels do not know the activation {feed_forward.activation!r}; they know {known}"
            )
        instruction, width = ACTIVATIONS[feed_forward.activation], feed_forward.width
        if feed_forward.experts is not None:
            add_mixture(self, layer, block, feed_forward.experts, instruction, linears, hidden)
            return
        first, down = block.feed_forward_groups()
        self.linear(first.name, layer, linears[first.name], hidden, WIDE)
        self.program.activate(instruction, WIDE, MIXED, width, feed_forward.is_gated)
        self.linear(down.name, layer, linears[down.name], MIXED, OUTPUT)

    def _join(
        self,
        sublayer: str,
        layer: int,
        scale: float,
        norms: dict[str, PackedNorm],
        following: PackedNorm | None,
    ) -> int:
        """Adds a sub-layer's output to the stream; returns the buffer of the next sub-layer's input."""
        size = self.sizes[STREAM]
        output, stream = norms.get(f"{sublayer}_output"), norms.get(f"{sublayer}_stream")
        if output is not None:
            self.program.norm(OUTPUT, OUTPUT, output)
        if scale != 1.0:
            self.program.scale(OUTPUT, size, scale)
        place = size, self._layout.place_index(sublayer), layer
        self.program.bottleneck(STREAM, OUTPUT, *place, stream, self._gates)
        if stream is not None:
            self.program.add_norm(OUTPUT, STREAM, STREAM, stream)
            self.program.unnormed(OUTPUT, STREAM, *place)
            self._leave_block(sublayer, size, layer)
            return self._begin(following)
        if following is None:
            self.program.add(OUTPUT, STREAM, size)
            return STREAM
        self.program.add_norm(OUTPUT, STREAM, NORMED, following)
        return NORMED

    def _leave_block(self, sublayer: str, size: int, layer: int) -> None:
        """What bottlenecks do to the stream behind an encoder's layer."""
        if self._gates and sublayer == "feed_forward":
            self.program.bottleneck(STREAM, STREAM, size, self._layout.place_index("output"), layer, None)


def _norms(block: Block, weights: BlockWeights) -> dict[str, PackedNorm]:
    """The norms that a block has, by name."""
    return {shape.name: PackedNorm.of(shape.norm, weights.norms[shape.name]) for shape in block.norms()}
