"""A decoder's forward as a program: the order of ``model.forward`` in the kernel's instructions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.slots import Layout
from manyhats.engine.backends.cpu.head.logits import PackedHead
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear
from manyhats.engine.backends.cpu.program import Program
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture, Attention, Block, FeedForward
from manyhats.engine.model.rotary import RotaryTables
from manyhats.engine.model.weights import BlockWeights, Linear, Weights

# Buffers of N rows: the stream, its norm, queries with keys and values (or gate with up), what attention (or the gate)
# makes of them, a sub-layer's output, a linear's input in integers. Buffers of M rows: the final norm and the logits.
STREAM, NORMED, WIDE, MIXED, OUTPUT, QUANTIZED, LAST, LOGITS = range(8)
_GATES = {"silu": col.SILU, "gelu_pytorch_tanh": col.GELU_TANH}

NormWeight = tuple[Tensor, float]
"""Weight and eps."""


class Forward:
    """The program of a decoder, and its packed weights.

    Attributes:
        program: its instructions.
        sizes: buffer → the largest size of its rows.
        num_bytes: resident bytes of the blocks' linears.
        head: packed.

    Raises:
        ModelError: the kernel does not know what a block computes.
    """

    def __init__(self, architecture: Architecture, weights: Weights, kernels: CpuKernels) -> None:
        self.program = Program()
        self.num_bytes = 0
        size = architecture.hidden_size
        self.sizes = {STREAM: size, NORMED: size, WIDE: 0, MIXED: 0, OUTPUT: size, QUANTIZED: 0, LAST: size}
        self._kernels = kernels
        self._layout = Layout.of(architecture)
        self._rotary = RotaryTables(architecture)
        norms = [
            _norms(block, of_block)
            for block, of_block in zip(architecture.blocks, weights.blocks, strict=True)
        ]
        befores = [of_block.get("attention_before") for of_block in norms]
        last = weights.final_norm.weight, architecture.final_norm.eps
        hidden = self._begin(befores[0])
        for index, block in enumerate(architecture.blocks):
            following = (*befores, last)[index + 1]
            hidden = self._block(index, block, weights.blocks[index], norms[index], hidden, following)
        self.program.gather(hidden, LAST, size)
        self.head = PackedHead(*kernels.pack_head(weights.head), architecture.head)
        self._product(self.head.fast or self.head.own, LAST, LOGITS, col.NUM_LOGIT_ROWS)
        self.sizes[LOGITS] = self.head.own.out_features
        if self.head.fast:
            self.program.refine(LAST, LOGITS, self.head.own)

    def _begin(self, norm: NormWeight | None) -> int:
        """Norms the stream as it begins, if the family does; returns the buffer of the first block's input."""
        if norm is None:
            return STREAM
        self.program.rms_norm(STREAM, NORMED, *norm)
        return NORMED

    def _block(
        self,
        layer: int,
        block: Block,
        weights: BlockWeights,
        norms: dict[str, NormWeight],
        hidden: int,
        following: NormWeight | None,
    ) -> int:
        """One block, whose input is in the buffer ``hidden``; returns the buffer of the next block's input."""
        linears = {group.name: [weights.linears[name] for name in group.names] for group in block.groups()}
        self._attention(layer, block.attention, linears, norms, hidden)
        outputs = norms.get("attention_output"), norms.get("feed_forward_output")
        hidden = self._join(0, layer, block.residual_scale, outputs[0], norms.get("feed_forward_before"))
        self._feed_forward(layer, block.feed_forward, linears, hidden)
        return self._join(1, layer, block.residual_scale, outputs[1], following)

    def _attention(
        self,
        layer: int,
        attention: Attention,
        linears: dict[str, list[Linear]],
        norms: dict[str, NormWeight],
        hidden: int,
    ) -> None:
        size = self._linear("qkv", layer, linears["qkv"], hidden, WIDE)
        if "query" in norms and "key" in norms:
            (query, eps), (key, _) = norms["query"], norms["key"]
            queries, keys = (query, attention.query_size), (key, attention.key_size)
            self.program.norm_heads(WIDE, size, queries, keys, eps)
        angles = self._rotary.tables[attention.rope]
        self.program.rotate(WIDE, size, layer, angles, attention.num_heads)
        sizes = size, attention.query_size
        self.program.attention(
            WIDE, MIXED, sizes, layer, attention.scale, attention.window, attention.softcap
        )
        self._linear("o", layer, linears["o"], MIXED, OUTPUT)

    def _feed_forward(
        self, layer: int, feed_forward: FeedForward, linears: dict[str, list[Linear]], hidden: int
    ) -> None:
        if feed_forward.activation not in _GATES:
            known = ", ".join(sorted(_GATES))
            raise ModelError(
                f"the CPU kernels do not know the activation {feed_forward.activation!r}; they know {known}"
            )
        size = self._linear("gate_up", layer, linears["gate_up"], hidden, WIDE)
        self.program.gate(_GATES[feed_forward.activation], WIDE, MIXED, size // 2)
        self._linear("down", layer, linears["down"], MIXED, OUTPUT)

    def _join(
        self,
        sublayer: int,
        layer: int,
        scale: float,
        norm: NormWeight | None,
        following: NormWeight | None,
    ) -> int:
        """Adds a sub-layer's output to the stream; returns the buffer of the next sub-layer's input."""
        size = self.sizes[STREAM]
        if norm is not None:
            self.program.rms_norm(OUTPUT, OUTPUT, *norm)
        if scale != 1.0:
            self.program.scale(OUTPUT, size, scale)
        self.program.bottleneck(STREAM, OUTPUT, size, sublayer, layer)
        if following is None:
            self.program.add(OUTPUT, STREAM, size)
            return STREAM
        self.program.add_rms_norm(OUTPUT, STREAM, NORMED, *following)
        return NORMED

    def _linear(self, group: str, layer: int, parts: Sequence[Linear], source: int, target: int) -> int:
        """A group of linears with its adapters' deltas; returns the size of its output."""
        packed = self._kernels.pack(parts)
        self.num_bytes += packed.num_bytes
        self._product(packed, source, target, col.NUM_ROWS)
        sizes = packed.in_features, packed.out_features
        index = self._layout.group_index(group)
        self.program.rescaled(source, target, packed, index, layer)
        self.program.deltas(source, target, sizes, index, layer)
        for buffer, size in zip((source, target), sizes, strict=True):
            self.sizes[buffer] = max(self.sizes[buffer], size)
        return packed.out_features

    def _product(self, packed: CpuLinear, source: int, target: int, rows: int) -> None:
        if packed.takes_int16:
            self.sizes[QUANTIZED] = max(self.sizes[QUANTIZED], packed.quantized_size)
        self.program.linear(source, target, packed, QUANTIZED, rows)


def _norms(block: Block, weights: BlockWeights) -> dict[str, NormWeight]:
    """The norms that a block has, by name."""
    return {shape.name: (weights.norms[shape.name].weight, shape.norm.eps) for shape in block.norms()}
