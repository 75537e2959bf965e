"""Attention of a step by plain torch: sequences of like size are padded to one another and run together.

Which rows and which cells these are follows from the plan, on the host; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.upload import uploaded_ints
from manyhats.engine.model.architecture import Attention

_TILE = 128
"""Query rows of one sequence that run together, so that windows and early rows read few cells."""
_MAX_VALUES = 1 << 26
"""Of scores, or of keys, at a time."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows of one sequence, and the positions that any of them sees.

    Attributes:
        sequence: its number.
        row: the first of ``count`` rows.
        position: of that row.
        start, end: the positions seen.
    """

    sequence: int
    row: int
    count: int
    position: int
    start: int
    end: int


def tiles_of(plan: StepPlan, attention: Attention) -> Iterator[Tile]:
    """The step's rows, each in one tile, by sequence."""
    starts = plan.query_start.tolist()
    for sequence, length in enumerate(plan.context_len.tolist()):
        first, last = starts[sequence : sequence + 2]
        for row in range(first, last, _TILE):
            count = min(_TILE, last - row)
            position = length - (last - row)
            start = attention.seen(position, length).start
            end = attention.seen(position + count - 1, length).stop
            yield Tile(sequence, row, count, position, start, end)


def grouped(tiles: Iterator[Tile], attention: Attention) -> list[list[Tile]]:
    """Tiles of like size: at most twice as many rows, and twice as many positions, as another of its group."""
    by_size: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        size = (tile.count - 1).bit_length(), (tile.end - tile.start - 1).bit_length()
        by_size.setdefault(size, []).append(tile)
    groups = []
    for (rows, positions), like in by_size.items():
        values = max(attention.num_heads << rows, attention.key_size) << positions
        most = max(1, _MAX_VALUES // values)
        groups += [like[first : first + most] for first in range(0, len(like), most)]
    return groups


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tiles that run together: b of them, padded to q rows and t positions.

    Attributes:
        tiles: on the host.
        rows: [b, q] the step's rows; the last is repeated.
        cells: [b, t] likewise.
        mask: [b, 1, q, t] what is added to the scores: 0, or −∞ for what a row does not see; [b, 1, 1, t] if all rows
            see the same.
    """

    tiles: list[Tile]
    rows: Tensor
    cells: Tensor
    mask: Tensor


class AttentionPlan:
    """The groups of one step for one kind of attention.

    Args:
        plan: the step's.
        tables: its block tables on the device.
        cache: that they name cells of.
        attention: of which ``window`` and ``sees_all`` matter.
        dtype: of the mask.
    """

    def __init__(
        self, plan: StepPlan, tables: Tensor, cache: TorchKVCache, attention: Attention, dtype: torch.dtype
    ) -> None:
        groups = grouped(tiles_of(plan, attention), attention)
        fields = [
            np.array([(t.sequence, t.row, t.count, t.position, t.start, t.end) for t in tiles]).T
            for tiles in groups
        ]
        *numbers, self._places = uploaded_ints([*fields, _places(groups, plan.num_rows)], tables.device)
        self.groups = [
            _group(tiles, of_tiles, tables, cache.block_size, attention, dtype)
            for tiles, of_tiles in zip(groups, numbers, strict=True)
        ]

    def attend(
        self,
        layer: int,
        queries: Tensor,
        cache: TorchKVCache,
        attention: Attention,
        gates: Mapping[int, Tensor],
        num_virtual: Mapping[int, int],
    ) -> Tensor:
        """Each row over what it sees: [N, H, K] → [N, H, K].

        Args:
            layer: whose keys and values are in the cache, this step's too.
            queries: the step's.
            cache: of keys and values.
            attention: the layer's.
            gates: factors of the keys, and of the values, of the first cells of a sequence; by sequence.
            num_virtual: how many cells these are.
        """
        found = []
        for group in self.groups:
            keys, values = cache.read(layer, group.cells, queries.dtype)
            for index, tile in enumerate(group.tiles):
                if tile.sequence in gates:
                    count = max(0, num_virtual[tile.sequence] - tile.start)
                    keys[index, :count] *= gates[tile.sequence][0]
                    values[index, :count] *= gates[tile.sequence][-1]
            size = group.rows.shape
            rows = queries.index_select(0, group.rows.flatten()).unflatten(0, size)
            found.append(attended(rows, keys, values, group.mask, attention).flatten(0, 1))
        return torch.cat(found).index_select(0, self._places)


def _places(groups: list[list[Tile]], num_rows: int) -> np.ndarray:
    """[N] where each row's result lies among those of all groups, padding included."""
    places, start = np.zeros(num_rows, np.int64), 0
    for tiles in groups:
        size = max(tile.count for tile in tiles)
        for index, tile in enumerate(tiles):
            first = start + index * size
            places[tile.row : tile.row + tile.count] = np.arange(first, first + tile.count)
        start += len(tiles) * size
    return places


def _group(
    tiles: list[Tile],
    numbers: Tensor,
    tables: Tensor,
    block_size: int,
    attention: Attention,
    dtype: torch.dtype,
) -> Group:
    sequence, row, count, position, start, end = numbers.unsqueeze(-1).unbind()
    num_rows = max(tile.count for tile in tiles)
    # A multiple of 8, which fused kernels want of a mask.
    num_cells = -(-max(tile.end - tile.start for tile in tiles) // 8) * 8
    device = tables.device
    offsets = torch.minimum(torch.arange(num_rows, device=device), count - 1)
    seen = start + torch.arange(num_cells, device=device)
    # What pads is the tile's own: no other sequence's values reach a product, where not even 0 times a NaN is 0.
    own = torch.minimum(seen, end - 1)
    cells = tables[sequence, own // block_size] * block_size + own % block_size
    at = (position + offsets).unsqueeze(2)
    there = seen.unsqueeze(1)
    is_seen = there < end.unsqueeze(1)
    if not attention.sees_all:
        is_seen = is_seen & (there <= at)
    if attention.window is not None:
        is_seen = is_seen & (there > at - attention.window) & (there < at + attention.window)
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=device).masked_fill_(~is_seen, -torch.inf)
    return Group(tiles, row + offsets, cells, mask.unsqueeze(1))


def attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, attention: Attention) -> Tensor:
    """``softmax(cap(scale · q Kᵀ) + mask) V``.

    Args:
        queries: [b, q, H, K].
        keys: [b, t, Hkv, K].
        values: the same.
        mask: [b, 1, q, t], or [b, 1, 1, t] if all rows see the same.
        attention: heads, scale and cap.

    Returns:
        [b, q, H, K].
    """
    size, group = queries.shape[1], attention.num_heads // attention.num_kv_heads
    # The heads that share keys become rows of one head: keys are not repeated.
    x = queries.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if mask.shape[2] > 1:
        mask = mask.repeat(1, 1, group, 1)
    if attention.softcap is None and x.dtype != torch.float32:
        found = functional.scaled_dot_product_attention(x, keys, values, mask, scale=attention.scale)
    else:
        found = _written_out(x, keys, values, mask, attention)
    mixed: Tensor = found.unflatten(2, (group, size)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return mixed


def _written_out(x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, attention: Attention) -> Tensor:
    """With a cap, which fused kernels lack, and in float32, which theirs may shorten."""
    scores = (x @ keys.transpose(2, 3)).float() * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    found: Tensor = torch.softmax(scores + mask, dim=-1).to(values.dtype) @ values
    return found
