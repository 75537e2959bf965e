"""Adapters at the two ends of the decoder: the embedding and the output head.

They are rare and act on few rows, so each adapter's rows are taken together and go through the ``linear``
kernel, whose results do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import EmbeddingLowRank, EmbeddingRows, HeadRows, HeadWeight, LowRank
from manyhats.engine.backends.cpu.packing import DEPTH, CpuLinear, pack_linear
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.model.weights import Linear

RunLinear = Callable[[Tensor, CpuLinear], Tensor]


def pack_dense(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> CpuLinear:
    """A dense [out, in] matrix for the ``linear`` kernel, with a bias; columns are padded with zeros to whole lanes."""
    missing = -weight.shape[1] % DEPTH
    padded = torch.nn.functional.pad(weight.to(dtype), (0, missing))
    return pack_linear([Linear(padded.contiguous(), bias)])


def pad_columns(x: Tensor) -> Tensor:
    """X [N, d] as float32 with zeros up to whole lanes."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[1] % DEPTH)).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class LowRankLookup:
    """``E[id] += scale · A[id] Bᵀ``."""

    a: Tensor
    b: CpuLinear
    scale: float

    @classmethod
    def of(cls, delta: EmbeddingLowRank, dtype: torch.dtype) -> LowRankLookup:
        """The delta, packed."""
        return cls(pad_columns(delta.a).to(dtype), pack_dense(delta.b, dtype), delta.scale)

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.a.numel() * self.a.element_size() + self.b.num_bytes

    def apply(self, hidden: Tensor, rows: Tensor, token_ids: Tensor, linear: RunLinear) -> None:
        """Adds to hidden [N, D] at ``rows``, whose tokens are ``token_ids``."""
        hidden[rows] += self.scale * linear(self.a[token_ids].float(), self.b)


@dataclass(frozen=True, slots=True, eq=False)
class ReplacedRows:
    """``E[ids[i]] = rows[i]``; ids ascend."""

    ids: Tensor
    rows: Tensor

    @classmethod
    def of(cls, delta: EmbeddingRows, dtype: torch.dtype) -> ReplacedRows:
        """The rows, sorted for look-up."""
        ids, order = delta.ids.sort()
        return cls(ids, delta.rows[order].to(dtype))

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.ids.numel() * 8 + self.rows.numel() * self.rows.element_size()

    def apply(self, hidden: Tensor, rows: Tensor, token_ids: Tensor, linear: RunLinear) -> None:
        """Replaces hidden [N, D] at those ``rows`` whose tokens have a row here."""
        index = torch.searchsorted(self.ids, token_ids).clamp_(max=self.ids.numel() - 1)
        found = self.ids[index] == token_ids
        hidden[rows[found]] = self.rows[index[found]].float()


@dataclass(frozen=True, slots=True, eq=False)
class HeadDelta:
    """``logits += scale · (h Aᵀ) Bᵀ``."""

    a: CpuLinear
    b: CpuLinear
    scale: float

    @classmethod
    def of(cls, delta: LowRank, dtype: torch.dtype) -> HeadDelta:
        """The delta, packed."""
        return cls(pack_dense(delta.a, dtype), pack_dense(delta.b, dtype), delta.scale)

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.a.num_bytes + self.b.num_bytes

    def apply(self, hidden: Tensor, logits: Tensor, rows: Tensor, linear: RunLinear) -> None:
        """Adds to logits [M, V] at ``rows``."""
        inside = pad_columns(linear(hidden[rows], self.a))
        logits[rows] += self.scale * linear(inside, self.b)


@dataclass(frozen=True, slots=True, eq=False)
class HeadColumns:
    """``logits[:, ids[i]] = rows[i] · h + bias[i]``."""

    ids: Tensor
    rows: CpuLinear

    @classmethod
    def of(cls, delta: HeadRows, dtype: torch.dtype) -> HeadColumns:
        """The delta, packed."""
        return cls(delta.ids, pack_dense(delta.rows, dtype, delta.bias))

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.ids.numel() * 8 + self.rows.num_bytes

    def apply(self, hidden: Tensor, logits: Tensor, rows: Tensor, linear: RunLinear) -> None:
        """Replaces columns of logits [M, V] at ``rows``."""
        logits[rows.unsqueeze(1), self.ids] = linear(hidden[rows], self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class OtherHead:
    """``logits = W h + b`` with a head of the adapter's own."""

    weight: CpuLinear

    @classmethod
    def of(cls, delta: HeadWeight, dtype: torch.dtype) -> OtherHead:
        """The delta, packed."""
        return cls(pack_dense(delta.weight, dtype, delta.bias))

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.num_bytes

    def apply(self, hidden: Tensor, logits: Tensor, rows: Tensor, linear: RunLinear) -> None:
        """Replaces logits [M, V] at ``rows``."""
        logits[rows] = linear(hidden[rows], self.weight)


EmbeddingChange = LowRankLookup | ReplacedRows
HeadChange = HeadDelta | HeadColumns | OtherHead


def rows_by_slot(rows: AdapterRows) -> Iterator[tuple[int, Tensor]]:
    """Each slot of a batch and its rows, int64; they lie side by side."""
    slots, counts = np.unique(rows.slots, return_counts=True)
    yield from zip(slots.tolist(), torch.from_numpy(rows.rows).long().split(counts.tolist()), strict=True)
