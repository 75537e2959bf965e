"""A forward as data: instructions for the kernel in ``step``, each for all rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.head.exact import NUM_PLACES
from manyhats.engine.backends.cpu.packing import DEPTH, RESCALED_ROWS, Array, CpuLinear, as_array
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Experts, Norm
from manyhats.engine.model.weights import NormWeight

Instructions = tuple[Array, Array]
"""[n, columns] int64, and [n, 2] float32."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedNorm:
    """A norm as the kernel takes it: weight and bias, of one shape, and whether the mean is taken off first."""

    weight: Tensor
    bias: Tensor
    is_layer: bool
    eps: float

    @classmethod
    def of(cls, norm: Norm, weights: NormWeight) -> PackedNorm:
        """A norm with its weights."""
        bias = torch.zeros_like(weights.weight) if weights.bias is None else weights.bias
        return cls(weights.weight, bias, norm.kind == "layer", norm.eps)


class Program:
    """Instructions in order.

    Buffers are numbered; a run supplies their memory. Weights are kept alive here and read in place.

    Attributes:
        num_scratch_values: float32 values that its linears need on each thread.
    """

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._numbers: list[tuple[float, float]] = []
        self._held: list[Any] = []
        self.num_scratch_values = 0

    def __len__(self) -> int:
        return len(self._rows)

    def arrays(self) -> Instructions:
        """Instructions [n, columns] int64, and their numbers [n, 2] float32: eps, factors, limits."""
        return (
            np.array(self._rows, dtype=np.int64).reshape(-1, col.NUM_COLUMNS),
            np.array(self._numbers, dtype=np.float32).reshape(-1, 2),
        )

    def norm(self, source: int, target: int, norm: PackedNorm) -> None:
        """``target`` is the norm of ``source``, which may be the same."""
        self._add(col.NORM, source, target, self._norm(norm), norm.eps)

    def add(self, source: int, stream: int, size: int) -> None:
        """``stream += source``."""
        self._add(col.ADD, source, stream, [size])

    def add_norm(self, source: int, stream: int, target: int, norm: PackedNorm) -> None:
        """``stream += source``; target, which may be stream, is the norm of it."""
        self._add(col.ADD_NORM, source, target, [*self._norm(norm), stream], norm.eps)

    def locate(self, target: int, table: Tensor, offset: int = 0, which: int = col.POSITIONS) -> None:
        """Adds to each row what a table [rows, size] float32 has for its position, or its token's type."""
        self._add(col.LOCATE, target, target, [table.shape[1], self._address(table), offset, which])

    def scale(self, target: int, size: int, factor: float) -> None:
        """``target *= factor``."""
        self._add(col.SCALE, target, target, [size], factor)

    def activate(
        self,
        instruction: int,
        source: int,
        target: int,
        size: int,
        is_gated: bool,
        rows: int = col.NUM_ROWS,
    ) -> None:
        """``target = activation(source)``; source holds a gate, then what it multiplies, if it is gated.

        Raises:
            ModelError: the rows are no whole vectors.
        """
        if size % DEPTH:
            raise ModelError(f"the CPU kernels activate rows of a multiple of {DEPTH} values, not {size}")
        self._add(instruction, source, target, [size, int(is_gated)], rows=rows)

    def softcap(self, target: int, size: int, limit: float) -> None:
        """``target = limit · tanh(target / limit)``."""
        self._add(col.SOFTCAP, target, target, [size], limit)

    def gather(self, source: int, target: int, size: int, rows: int) -> None:
        """Copies rows whose logits, or hidden values, are wanted; ``rows`` is the frame's column of their number."""
        which = {col.NUM_LOGIT_ROWS: col.LOGIT_ROWS, col.NUM_HIDDEN_ROWS: col.HIDDEN_ROWS}[rows]
        self._add(col.GATHER, source, target, [size, 0, 0, which], rows=rows)

    def scatter(self, source: int, target: int, size: int) -> None:
        """Copies the vectors that enter behind the norm of the embeddings to their rows."""
        own = [size, 0, 0, col.NORMED_ROWS]
        self._add(col.SCATTER, source, target, own, rows=col.NUM_NORMED_ROWS)

    def norm_heads(
        self, target: int, size: int, queries: tuple[PackedNorm, int], keys: tuple[PackedNorm, int]
    ) -> None:
        """Norms of queries and keys, in place, over as many values at a time as a head's weight has.

        Args:
            target: queries, keys, values.
            size: of a row.
            queries: the norm, and the number of values of a row's queries.
            keys: the same for keys; its norm is of the queries' kind and eps.
        """
        (query, query_size), (key, key_size) = queries, keys
        own = [
            size,
            self._address(query.weight),
            self._address(query.bias),
            int(query.is_layer),
            *(query.weight.shape[-1], query_size),
            *(self._address(key.weight), self._address(key.bias)),
            *(key.weight.shape[-1], key_size),
            query.weight.shape[-1] if query.weight.dim() > 1 else 0,
        ]
        self._add(col.NORM_HEADS, target, target, own, query.eps)

    def rotate(
        self, target: int, size: int, layer: int, angles: tuple[Tensor, Tensor], num_heads: int
    ) -> None:
        """Rotary embedding of queries and keys, in place; keys and values go into the cache.

        Args:
            target: queries, keys, values.
            size: of a row.
            layer: of the cache.
            angles: cosines and sines by position, [positions, half] each.
            num_heads: of queries.
        """
        cos, sin = angles
        own = [size, layer, self._address(cos), self._address(sin), cos.shape[1], num_heads]
        self._add(col.ROTATE, target, target, own)

    def attention(
        self,
        source: int,
        target: int,
        sizes: tuple[int, int],
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sees_all: bool = False,
    ) -> None:
        """Attention of each row over its sequence's cached positions.

        Args:
            source: rotated queries come first in each row.
            target: the weighted sums of values.
            sizes: of a row of source, and of target.
            layer: of the cache.
            scale: of the scores.
            window: positions that a row sees, itself included; None for all.
            softcap: c in ``c · tanh(x / c)``; None for no cap.
            sees_all: whether a row sees positions behind its own, too.
        """
        own = [sizes[0], layer, sizes[1], window or 0, int(sees_all)]
        self._add(col.ATTENTION, source, target, own, scale, softcap or 0.0)

    def linear(
        self, source: int, target: int, packed: CpuLinear, converted: int, rows: int = col.NUM_ROWS
    ) -> None:
        """``target = source Wᵀ + b``; ``converted`` is for the source in integers or bfloat16, if they need that."""
        self._need(packed.num_scratch_values)
        if packed.converted_size:
            self.convert(source, converted, packed, rows)
            source = converted
        self._add(col.LINEAR, source, target, self._linear(packed, 0, 0), rows=rows)

    def convert(self, source: int, target: int, packed: CpuLinear, rows: int = col.NUM_ROWS) -> None:
        """``target`` is the source in integers or bfloat16, as these weights take it."""
        instruction = col.QUANTIZE if packed.takes_int16 else col.NARROW
        self._add(instruction, source, target, [packed.in_features], rows=rows)

    def route(self, source: int, routes: int, size: int, experts: Experts) -> None:
        """``routes`` has each row's experts and their weights, by the router's logits, which begin a row of source."""
        own = [size, experts.num, experts.num_per_row, 0, int(experts.renormalizes)]
        self._add(col.ROUTE, source, routes, own)

    def pair(self, routes: int, pairs: int, experts: Experts) -> Array:
        """``pairs`` has the pairs of rows and experts in order, routes their places in it.

        Returns:
            [1] int64, which holds, once a step has come to here, how many experts have pairs.
        """
        num_used = np.zeros(1, dtype=np.int64)
        own = [0, experts.num, experts.num_per_row, 0, pairs, 0, 0, 0, self._address(num_used)]
        self._add(col.PAIR, routes, pairs, own)
        return num_used

    def spread(self, source: int, target: int, num_words: int, pairs: int, experts: Experts) -> None:
        """Copies each row, of so many 32-bit words, to its pairs."""
        own = [num_words, experts.num, 0, 0, pairs]
        self._add(col.SPREAD, source, target, own, rows=col.NUM_PAIRS)

    def expert_linear(
        self, source: int, target: int, packed: Sequence[CpuLinear], pairs: int, num_used: Array
    ) -> None:
        """``target = source Wᵀ + b`` for the pairs of each expert with its own weights, all of one shape and kind."""
        table = np.zeros((len(packed), col.NUM_COLUMNS), dtype=np.int64)
        for row, each in zip(table, packed, strict=True):
            weights = self._linear(each, 0, 0)
            row[col.SIZE : col.SIZE + len(weights)] = weights
        first = packed[0]
        self._need(first.num_scratch_values)
        own = [first.in_features, len(packed), 0, first.out_features, pairs, first.panel_rows]
        own += [self._address(table), first.converted_size or first.in_features, self._address(num_used)]
        self._add(col.EXPERT_LINEAR, source, target, own, rows=col.NUM_PAIRS)

    def expert_deltas(
        self,
        source: int,
        target: int,
        sizes: tuple[int, int],
        layer: int,
        members: range,
        is_of_pairs: bool,
        routes: int,
        experts: Experts,
    ) -> None:
        """Each row's own low-rank deltas on its experts.

        Args:
            source: inputs of rows, or of pairs.
            target: outputs of pairs.
            sizes: of a row of source, and of target.
            layer: of the adapters' entries.
            members: which of an expert's linears target holds side by side.
            is_of_pairs: whether source does.
            routes: the buffer of rows' experts.
            experts: of the layer.
        """
        own = [sizes[0], layer, experts.num_per_row, sizes[1], routes]
        own += [members.start, len(members), int(is_of_pairs)]
        self._add(col.EXPERT_DELTAS, source, target, own)

    def combine(self, source: int, target: int, size: int, routes: int, experts: Experts) -> None:
        """``target`` is the sum of what each row's experts made of it, times their weights."""
        own = [size, 0, experts.num_per_row, 0, routes]
        self._add(col.COMBINE, source, target, own)

    def refine(self, source: int, target: int, head: CpuLinear) -> None:
        """Makes the logits of each row's likeliest tokens what a dense head gives, those of target being near that."""
        self._need(NUM_PLACES)
        self._add(col.REFINE, source, target, self._linear(head, 0, 0), rows=col.NUM_LOGIT_ROWS)

    def refine_allowed(self, allowed: int, source: int, target: int, head: CpuLinear) -> None:
        """The same for the rows and tokens in ``allowed``, [R, 1 + ⌈V / 32⌉] int32: rows of target, then masks."""
        self._need(NUM_PLACES)
        self._add(col.REFINE_ALLOWED, source, target, self._linear(head, allowed, 0))

    def exact_logits(self, pairs: int, source: int, target: int, head: CpuLinear) -> None:
        """target [P] = what a dense head gives for ``pairs`` of row and token, [P, 2] int64."""
        self._add(col.EXACT_LOGITS, source, target, self._linear(head, pairs, 0))

    def rescaled(self, source: int, target: int, packed: CpuLinear, group: int, layer: int) -> None:
        """The linear again, for rows whose adapters rescale its input."""
        self._need(packed.num_scratch_values + RESCALED_ROWS * (2 * packed.in_features + packed.panel_rows))
        self._add(col.RESCALED, source, target, self._linear(packed, group, layer))

    def deltas(
        self, source: int, target: int, sizes: tuple[int, int], group: int, layer: int, gates: int = 0
    ) -> None:
        """Each row's own scales, offsets and low-rank deltas; sizes are the linears' inputs and outputs.

        ``gates`` is the buffer for those of texts; 0 where there are none.
        """
        if gates:
            self._add(col.GATE_LINEARS, source, gates, [sizes[0], layer, 0, sizes[1], group])
        own = [sizes[0], layer, 0, sizes[1], group, 0, 0, 0, gates]
        self._add(col.DELTAS, source, target, own)

    def bottleneck(
        self,
        stream: int,
        target: int,
        size: int,
        sublayer: int,
        layer: int,
        norm: PackedNorm | None,
        gates: int = 0,
    ) -> None:
        """Each row's own bottleneck on a sub-layer's output, which the norm of the stream follows, if any."""
        own, eps = [size, layer, 0, 0, sublayer, 0, 0, 0, gates], 0.0
        if norm is not None:
            own[5:8] = [self._address(norm.weight), self._address(norm.bias), int(norm.is_layer)]
            eps = norm.eps
        if gates:
            self._add(col.GATE_SUBLAYER, stream, target, own, eps)
        self._add(col.BOTTLENECK, stream, target, own, eps)

    def gate_prefix(self, source: int, size: int, layer: int) -> None:
        """Texts' own prefixes times their gates, of the attention's input, in the cache."""
        self._add(col.GATE_PREFIX, source, source, [size, layer])

    def unnormed(self, source: int, stream: int, size: int, sublayer: int, layer: int) -> None:
        """``stream = source`` for rows whose bottlenecks, which left their streams in source, skip its norm."""
        self._add(col.UNNORMED, source, stream, [size, layer, 0, 0, sublayer])

    def _linear(self, packed: CpuLinear, group: int, layer: int) -> list[int]:
        arrays = (packed.weights, packed.absmax, packed.row_block, packed.row_offset, packed.nested)
        addresses = [self._address(array) for array in (*arrays, packed.nested_code, packed.bias)]
        sizes = packed.kind, packed.out_features, group, packed.panel_rows
        return [packed.in_features, layer, *sizes, *addresses]

    def _norm(self, norm: PackedNorm) -> list[int]:
        addresses = self._address(norm.weight), self._address(norm.bias)
        return [norm.weight.numel(), *addresses, int(norm.is_layer)]

    def _need(self, num_values: int) -> None:
        self.num_scratch_values = max(self.num_scratch_values, num_values)

    def _address(self, values: Any) -> int:
        array = as_array(values) if isinstance(values, Tensor) else values
        self._held.append(array)
        return int(array.ctypes.data)

    def _add(
        self,
        instruction: int,
        source: int,
        target: int,
        own: Sequence[int],
        first: float = 0.0,
        second: float = 0.0,
        rows: int = col.NUM_ROWS,
    ) -> None:
        row = [instruction, rows, source, target, *own]
        self._rows.append(row + [0] * (col.NUM_COLUMNS - len(row)))
        self._numbers.append((first, second))
