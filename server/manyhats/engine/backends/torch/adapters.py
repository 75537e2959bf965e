"""Adapters of the torch backend, as they were lowered: matrices rounded to the slots' dtype, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from manyhats.adapters.primitives import (
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    LayerNorm,
    LoweredAdapter,
)
from manyhats.adapters.sites import Site

EMBEDDING = Site(-1, "embed_tokens")
HEAD = Site(-1, "lm_head")
_MATRICES = frozenset(("a", "b", "rows", "weight", "down", "up"))

DeltaT = TypeVar("DeltaT")
PartT = TypeVar("PartT", bound=Any)


@dataclass(frozen=True, slots=True, eq=False)
class TorchAdapter:
    """One adapter's deltas by the site where they act, in their order."""

    deltas: Mapping[Site, tuple[Delta, ...]]
    num_bytes: int

    def at(self, site: Site, kind: type[DeltaT]) -> list[DeltaT]:
        """Those of one kind at a site."""
        return [delta for delta in self.deltas.get(site, ()) if isinstance(delta, kind)]


class TorchAdapterSlots:
    """``AdapterSlots`` of the torch backend.

    Args:
        dtype: that matrices are rounded to; arithmetic is float32.
        device: where they lie.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.placed: dict[int, TorchAdapter] = {}
        self._dtype = dtype
        self._device = device

    def pack(self, adapter: LoweredAdapter) -> TorchAdapter:
        """Its deltas, sorted by site."""
        by_site: dict[Site, tuple[Delta, ...]] = {}
        for delta in adapter.deltas:
            site = site_of(delta)
            by_site[site] = (*by_site.get(site, ()), self._kept(delta))
        tensors = [tensor for deltas in by_site.values() for delta in deltas for tensor in _tensors_of(delta)]
        return TorchAdapter(by_site, sum(tensor.nbytes for tensor in tensors))

    def place(self, slot: int, packed: TorchAdapter) -> None:
        """Puts an adapter into a slot."""
        self.placed[slot] = packed

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self.placed.pop(slot, None)

    def _kept(self, part: PartT) -> PartT:
        """A delta, or a norm in it, on the device."""
        changes: dict[str, Any] = {}
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, LayerNorm):
                changes[field.name] = self._kept(value)
            elif isinstance(value, Tensor):
                is_matrix = field.name in _MATRICES and not isinstance(part, LayerNorm)
                value = value.to(self._device, self._dtype if is_matrix else value.dtype)
                changes[field.name] = value if field.name == "ids" else value.float()
        kept: PartT = replace(part, **changes)
        return kept


def _tensors_of(part: Any) -> list[Tensor]:
    values = [getattr(part, field.name) for field in fields(part)]
    return [value for value in values if isinstance(value, Tensor)]


def site_of(delta: Delta) -> Site:
    """Where a delta acts."""
    if isinstance(delta, EmbeddingLowRank | EmbeddingRows):
        return EMBEDDING
    if isinstance(delta, HeadRows | HeadWeight):
        return HEAD
    return delta.site
