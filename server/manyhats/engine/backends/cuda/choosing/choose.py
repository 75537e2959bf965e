"""The kernels that choose tokens and find log-probabilities, their scratch memory, and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from manyhats.engine.backends.cuda.triton.choosing import EDGES, choose, gather, weigh
from manyhats.engine.backends.cuda.triton.logprobs import logprobs
from manyhats.engine.backends.cuda.triton.survey import survey

MAX_VOCAB_SIZE = 1 << 20
"""Sums of weights of 2⁴² must fit into 64 bits."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How many entries of a row a program looks at at once, powers of 2.

    Attributes:
        part: of a program where several share a row; the bits of log-probabilities depend on it.
        edits: edits at once.
        tile: of a program that has a row for itself.
        listed: the most entries that a choice lists, to look at them alone.
        num_warps: of all programs.
    """

    part: int = 4096
    edits: int = 64
    tile: int = 1024
    listed: int = 2048
    num_warps: int = 8


@dataclass(frozen=True, slots=True)
class AtMost:
    """The most that may be wanted of a step.

    Attributes:
        choices: tokens to choose.
        is_drawn: whether one of them may have a temperature over 0.
        pairs: log-probabilities.
    """

    choices: int
    is_drawn: bool
    pairs: int


class Choosing:
    """What ``triton.survey``, ``choosing`` and ``logprobs`` need besides logits and what is wanted of them.

    Args:
        device: where.
        max_rows: the most rows of logits.
        max_choices: the most of them that choose.
        vocab_size: the largest V, at most ``MAX_VOCAB_SIZE``.
        tiles: how programs go through a row.

    Raises:
        ValueError: the vocabulary is too large.
    """

    def __init__(
        self,
        device: torch.device,
        max_rows: int,
        max_choices: int,
        vocab_size: int,
        tiles: Tiles | None = None,
    ) -> None:
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"a vocabulary of {vocab_size} tokens, more than {MAX_VOCAB_SIZE}")
        self._max_rows = max_rows
        self._max_choices = max_choices
        self._tiles = tiles or Tiles()
        num_parts = self.num_parts(vocab_size)

        def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        lines = max_rows + max_choices
        self._largest = scratch(torch.float32, lines, num_parts)
        self._first = scratch(torch.int32, lines, num_parts)
        self._totals = scratch(torch.float32, lines, num_parts)
        self._changed = scratch(torch.float32, max_choices, vocab_size)
        self._counts = scratch(torch.int32, max_choices, EDGES.value, num_parts)
        self._masses = scratch(torch.int64, max_choices, EDGES.value, num_parts)
        self._list_values = scratch(torch.float32, max_choices, self._tiles.listed)
        self._list_ids = scratch(torch.int32, max_choices, self._tiles.listed)

    def num_parts(self, vocab_size: int) -> int:
        """Programs that share a row of so many logits."""
        return -(-vocab_size // self._tiles.part)

    @property
    def num_bytes(self) -> int:
        """Of the scratch memory."""
        return sum(each.nbytes for each in self._scratch)

    @property
    def _scratch(self) -> tuple[Tensor, ...]:
        return (
            self._largest,
            self._first,
            self._totals,
            self._changed,
            self._counts,
            self._masses,
            self._list_values,
            self._list_ids,
        )

    def launch(self, logits: Tensor, wants: Tensor, found: Tensor, at_most: AtMost) -> None:
        """Launches the kernels; what is wanted, and how much of it, they read from ``wants``.

        Args:
            logits: [M, V] float32, M at most ``max_rows``.
            wants: bytes, see ``triton.wanted``; read.
            found: bytes, written.
            at_most: what ``wants`` may hold.

        Raises:
            ValueError: there is no room for so many rows or choices.
        """
        num_rows, size = logits.shape
        if num_rows > self._max_rows or at_most.choices > self._max_choices:
            raise ValueError(
                f"{num_rows} rows and {at_most.choices} choices, of {self._max_rows} and {self._max_choices}"
            )
        tiles, parts = self._tiles, self.num_parts(size)
        options = {"num_warps": tiles.num_warps, "enable_fp_fusion": False}
        spread = {"PART": tiles.part, "PARTS": triton.next_power_of_2(parts)}
        stats = (self._largest, self._first, self._totals)
        lines = num_rows + at_most.choices
        survey[lines, parts](
            logits,
            self._changed,
            wants,
            found,
            *stats,
            size,
            num_rows,
            PART=tiles.part,
            EDITS=tiles.edits,
            **options,
        )
        rows = (logits, self._changed, wants)
        lists = (self._counts, self._masses, self._list_values, self._list_ids)
        sizes = (size, num_rows, parts)
        if at_most.is_drawn:
            grid = (at_most.choices, parts)
            weigh[grid](*rows, self._largest, *lists[:2], *sizes, **spread, **options)
            gather[grid](*rows, self._largest, *lists, *sizes, **spread, LISTED=tiles.listed, **options)
        if at_most.choices:
            choose[(at_most.choices,)](
                *rows,
                found,
                *stats[:2],
                *lists,
                *sizes,
                **spread,
                TILE=tiles.tile,
                LISTED=tiles.listed,
                **options,
            )
        if at_most.pairs:
            logprobs[(at_most.pairs,)](logits, wants, found, *stats, size, parts, **spread, **options)
