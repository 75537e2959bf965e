"""Adapters of the torch backend, as they were lowered: matrices rounded to the slots' dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from manyhats.adapters.primitives import Delta, Gate, LayerNorm, LoweredAdapter, by_site
from manyhats.adapters.sites import Site

_MATRICES = frozenset(("a", "b", "rows", "weight", "down", "up"))

DeltaT = TypeVar("DeltaT")
PartT = TypeVar("PartT", bound=Any)


@dataclass(frozen=True, slots=True, eq=False)
class TorchAdapter:
    """One adapter's deltas by the site where they act, in their order."""

    deltas: Mapping[Site, Sequence[Delta]]
    num_bytes: int
    vocab_size: int | None = None

    def at(self, site: Site, kind: type[DeltaT]) -> list[DeltaT]:
        """The deltas of one kind at a site."""
        return [delta for delta in self.deltas.get(site, ()) if isinstance(delta, kind)]


class TorchAdapterSlots:
    """``AdapterSlots`` of the torch backend.

    Args:
        dtype: that matrices are rounded to; arithmetic is float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.placed: dict[int, TorchAdapter] = {}
        self._dtype = dtype

    @property
    def memory(self) -> None:
        """Placing takes no time."""
        return None

    def pack(self, adapter: LoweredAdapter) -> TorchAdapter:
        """Its deltas, sorted by site."""
        deltas = [self._kept(delta) for delta in adapter.deltas]
        tensors = [tensor for delta in deltas for tensor in _tensors_of(delta)]
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        return TorchAdapter(by_site(deltas), num_bytes, adapter.vocab_size)

    def place(self, slot: int, packed: TorchAdapter) -> None:
        """Puts an adapter into a slot."""
        self.placed[slot] = packed

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self.placed.pop(slot, None)

    def _kept(self, part: PartT) -> PartT:
        """A delta, or a norm or gate in it, rounded."""
        changes: dict[str, Any] = {}
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, LayerNorm | Gate):
                changes[field.name] = self._kept(value)
            elif isinstance(value, Tensor):
                is_matrix = field.name in _MATRICES and not isinstance(part, LayerNorm | Gate)
                value = value.to(self._dtype if is_matrix else value.dtype)
                changes[field.name] = value if field.name == "ids" else value.float()
        kept: PartT = replace(part, **changes)
        return kept


def _tensors_of(part: Any) -> list[Tensor]:
    """A delta's tensors, and those of norms and gates in it."""
    values = [getattr(part, field.name) for field in fields(part)]
    inner = [
        tensor for value in values if isinstance(value, LayerNorm | Gate) for tensor in _tensors_of(value)
    ]
    return [value for value in values if isinstance(value, Tensor)] + inner
