"""What a forward's program is built with: its buffers, and linears with what adapters add to them."""

from __future__ import annotations

from collections.abc import Sequence

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.slots import Layout
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear
from manyhats.engine.backends.cpu.program import Program
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Linear

# Buffers of N rows: the tokens' vectors, where they are not the stream at once; the stream, its norm, and that for a
# feed-forward beside the attention; queries with keys and values (or gate with up), what attention (or the activation)
# makes of them, a sub-layer's output, a linear's input in integers or bfloat16. Buffers of M rows: the final norm,
# where that is not what the head reads; what it reads, and the logits. Buffers of H rows: the first two of these for
# rows whose hidden values are wanted. With experts, of N rows too: the router's logits, rows' experts, the pairs of
# both, and the inputs of pairs, then their outputs; a row of WIDE, MIXED, CONVERTED and PAIRED is then those of its k
# pairs. And what enters behind the norm of the embeddings, and texts' gates.
(
    EMBEDDED,
    STREAM,
    NORMED,
    BESIDE,
    WIDE,
    MIXED,
    OUTPUT,
    CONVERTED,
    FINAL,
    LAST,
    LOGITS,
    FINAL_HIDDEN,
    HIDDEN,
    ROUTED,
    ROUTES,
    PAIRS,
    PAIRED,
    NORMED_EMBEDDED,
    GATES,
) = range(19)
NUM_BUFFERS = 19
OF_LOGIT_ROWS = (FINAL, LAST, LOGITS)
OF_HIDDEN_ROWS = (FINAL_HIDDEN, HIDDEN)


class Building:
    """A program, and what the instructions so far need.

    Attributes:
        program: its instructions.
        kernels: that will run it.
        sizes: buffer → the largest size of its rows.
        num_bytes: resident bytes of the blocks' linears.
        num_per_row: the experts of a row, or 0.
    """

    def __init__(self, architecture: Architecture, kernels: CpuKernels) -> None:
        self.program = Program()
        self.kernels = kernels
        self.num_bytes = self.num_per_row = 0
        size = architecture.hidden_size
        self.sizes = {
            **dict.fromkeys(range(NUM_BUFFERS), 0),
            **dict.fromkeys((STREAM, NORMED, OUTPUT), size),
            **dict.fromkeys((LAST, HIDDEN), architecture.read_size),
        }
        # A step has all rows of a text where they see each other.
        self._gates = GATES if architecture.attention.sees_all else 0
        self.sizes[GATES] = col.GATES_OF_TEXT if self._gates else 0
        self._layout = Layout.of(architecture)
        self._packed: dict[tuple[Linear, ...], CpuLinear] = {}

    def linear(self, group: str, layer: int, parts: Sequence[Linear], source: int, target: int) -> int:
        """A group of linears with its adapters' deltas; returns the size of its output."""
        packed = self.pack(parts)
        self.product(packed, source, target, col.NUM_ROWS)
        self.deltas(group, layer, packed, source, target)
        for buffer, size in ((source, packed.in_features), (target, packed.out_features)):
            self.need(buffer, size)
        return packed.out_features

    def deltas(self, group: str, layer: int, packed: CpuLinear, source: int, target: int) -> None:
        """What adapters change of the outputs of a group of linears."""
        index = self._layout.group_index(group)
        self.program.rescaled(source, target, packed, index, layer)
        sizes = packed.in_features, packed.out_features
        self.program.deltas(source, target, sizes, index, layer, self._gates)

    def pack(self, parts: Sequence[Linear]) -> CpuLinear:
        """Lays out linears of a block over the same input as one; those that layers share, once."""
        key = tuple(parts)
        if key not in self._packed:
            self._packed[key] = self.kernels.pack(parts)
            self.num_bytes += self._packed[key].num_bytes
        return self._packed[key]

    def product(self, packed: CpuLinear, source: int, target: int, rows: int) -> None:
        """A linear by itself, on so many rows as the frame has in the column ``rows``."""
        self.need(CONVERTED, packed.converted_size)
        self.program.linear(source, target, packed, CONVERTED, rows)

    def need(self, buffer: int, size: int) -> None:
        """Makes a buffer's rows at least that large."""
        self.sizes[buffer] = max(self.sizes[buffer], size)
