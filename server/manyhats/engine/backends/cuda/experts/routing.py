"""Launches what sends rows to experts, and sums what these give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.segments import most_segments
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, split_of
from manyhats.engine.backends.cuda.triton import routing
from manyhats.engine.model.architecture import Experts

_ROWS = 16
_EXPERTS = 32
_INPUTS = 32
_PAIRS = 1024
"""Pairs that a program counts at a time."""
_OUTPUTS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SortedPairs:
    """Pairs of rows and experts in the order of experts, in tiles; what there is is counted on the device.

    Attributes:
        pairs: [P] int32.
        tiles: [≥ max_tiles, 3] int32: expert, first place among the pairs, and how many.
        num_tiles: [1] int32.
        max_tiles: of the grids.
    """

    pairs: Tensor
    tiles: Tensor
    num_tiles: Tensor
    max_tiles: int

    @classmethod
    def room(cls, num_pairs: int, num_experts: int, size: int, device: torch.device) -> SortedPairs:
        """For so many pairs, in tiles of at least some size."""
        tiles = most_segments(num_pairs, num_experts, size)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(empty(num_pairs), empty(tiles, 3), empty(1), tiles)


def route(x: Tensor, router: Tensor, parts: Tensor) -> Tensor:
    """Launches ``x Wᵀ`` in float32, in ranges of K whose sum are the router's logits.

    Args:
        x: [N, K] bfloat16, contiguous.
        router: W [E, K] float32, contiguous.
        parts: float32, room for the ranges.

    Returns:
        [ranges, N, E] of ``parts``.
    """
    (num_rows, size), num_experts = x.shape, router.shape[0]
    num_splits, split = split_of(size)
    found = parts[: num_splits * num_rows * num_experts].view(num_splits, num_rows, num_experts)
    grid = triton.cdiv(num_rows, _ROWS), triton.cdiv(num_experts, _EXPERTS), num_splits
    routing.router[grid](
        x, router, found, num_rows, size, num_experts, split, BM=_ROWS, BE=_EXPERTS, BK=_INPUTS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return found


def choose_experts(parts: Tensor, experts: Experts, chosen: Tensor, shares: Tensor) -> None:
    """Launches the choice of each row's experts, and what each weighs, as ``forward.routed`` has them.

    Args:
        parts: [ranges, N, E] float32, whose sum are the router's logits.
        experts: how many are chosen.
        chosen: [N, k] int32, written.
        shares: [N, k] float32, written.
    """
    num_splits, num_rows, num_experts = parts.shape
    routing.route[(num_rows,)](
        parts, chosen, shares, num_rows, E=num_experts, BE=triton.next_power_of_2(num_experts),
        TOP=experts.num_per_row, SPLITS=num_splits, RENORMALIZES=experts.renormalizes,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def sort_pairs(
    chosen: Tensor, num_experts: int, size: int, room: SortedPairs, step: StepAdapters | None = None
) -> SortedPairs:
    """Launches the sorting of the pairs of all rows, or of a step's places, by expert.

    Args:
        chosen: [N, k] int32.
        num_experts: E.
        size: of tiles.
        room: for them.
        step: whose rows with an adapter are paired; None for all rows.

    Returns:
        What there is in the room.
    """
    num_rows, num_chosen = chosen.shape
    num_pairs = (num_rows if step is None else step.max_rows) * num_chosen
    rows = (chosen, room.num_tiles) if step is None else (step.rows, step.num_rows)
    max_tiles = most_segments(num_pairs, num_experts, size)
    assert max_tiles <= room.max_tiles
    routing.sort_pairs[(num_experts,)](
        chosen, *rows, room.pairs, room.tiles, room.num_tiles, num_rows,
        E=num_experts, BE=triton.next_power_of_2(num_experts), TOP=num_chosen, GATHERS=step is not None,
        SIZE=size, BLOCK=_PAIRS, enable_fp_fusion=False,
    )  # fmt: skip
    return SortedPairs(room.pairs[:num_pairs], room.tiles, room.num_tiles, max_tiles)


def combine(y: Tensor, shares: Tensor, out: Tensor) -> None:
    """Launches ``Σ share · y`` of each row's experts, in order.

    Args:
        y: [N · k, D] float32, contiguous.
        shares: [N, k] float32, contiguous.
        out: [N, D] float32, contiguous; written.
    """
    num_rows, size = out.shape
    routing.combine[(num_rows, triton.cdiv(size, _OUTPUTS))](
        y, shares, out, size, TOP=shares.shape[1], BLOCK=_OUTPUTS, enable_fp_fusion=False
    )
