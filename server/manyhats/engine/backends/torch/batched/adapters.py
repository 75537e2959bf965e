"""Adapters on a device: packed into one buffer in the host's memory, which is copied to the device as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from manyhats.adapters.primitives import (
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    Gate,
    HeadRows,
    HeadWeight,
    LayerNorm,
    LoweredAdapter,
    LowRank,
    by_site,
)
from manyhats.adapters.sites import Site
from manyhats.engine.backends.torch.batched.adapter_memory import CountedMemory

_ALIGNMENT = 256
_MATRICES = frozenset(("a", "b", "rows", "weight", "down", "up"))

PartT = TypeVar("PartT", bound=Any)
DeltaT = TypeVar("DeltaT")


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """One adapter in host memory.

    Attributes:
        deltas: whose tensors are views of ``buffer``.
        buffer: uint8, pinned if it goes to a GPU.
        vocab_size: see ``LoweredAdapter``.
    """

    deltas: Sequence[Delta]
    buffer: Tensor
    vocab_size: int | None

    @property
    def num_bytes(self) -> int:
        """Of the buffer, which takes as much on the device."""
        return self.buffer.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class DeviceAdapter:
    """One adapter on the device: its deltas by the site where they act, in their order."""

    deltas: Mapping[Site, Sequence[Delta]]
    vocab_size: int | None

    def at(self, site: Site, kind: type[DeltaT]) -> list[DeltaT]:
        """The deltas of one kind at a site."""
        return [delta for delta in self.deltas.get(site, ()) if isinstance(delta, kind)]


class DeviceAdapterSlots:
    """``AdapterSlots`` on a device.

    Args:
        stored: dtype that matrices are rounded to.
        computed: dtype of linears' inputs, which the matrices of low rank and of heads have.
        device: where they lie.
        num_bytes: of the device's memory that they may take; None for any.
    """

    def __init__(
        self, stored: torch.dtype, computed: torch.dtype, device: torch.device, num_bytes: int | None = None
    ) -> None:
        self.memory = None if num_bytes is None else CountedMemory(num_bytes)
        self.placed: dict[int, DeviceAdapter] = {}
        self._stored = stored
        self._computed = computed
        self._device = device

    def pack(self, adapter: LoweredAdapter) -> HostAdapter:
        """Rounds it and lays it out."""
        rounded = [self._rounded(delta) for delta in adapter.deltas]
        tensors = [tensor for delta in rounded for tensor in _tensors_of(delta)]
        starts, total = {}, 0
        for tensor in tensors:
            starts[id(tensor)] = total
            total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

        def kept(tensor: Tensor) -> Tensor:
            view = _view(buffer, starts[id(tensor)], tensor)
            view.copy_(tensor)
            return view

        return HostAdapter([_mapped(delta, kept) for delta in rounded], buffer, adapter.vocab_size)

    def place(self, slot: int, packed: HostAdapter) -> None:
        """Queues the copy of its buffer, ahead of the steps that use the slot.

        Raises:
            MemoryError: ``memory`` has no room for it.
        """
        if self.memory is not None:
            self.memory.take(slot, packed.num_bytes)
        buffer = packed.buffer.to(self._device, non_blocking=True)

        def there(tensor: Tensor) -> Tensor:
            return _view(buffer, int(tensor.storage_offset()) * tensor.itemsize, tensor)

        deltas = [_mapped(delta, there) for delta in packed.deltas]
        self.placed[slot] = DeviceAdapter(by_site(deltas), packed.vocab_size)

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self.placed.pop(slot, None)
        if self.memory is not None:
            self.memory.give_back(slot)

    def _rounded(self, delta: Delta) -> Delta:
        """Matrices as the slots store them, then as they are multiplied; all else in float32."""
        kind = {LowRank: self._computed, HeadRows: self._computed, HeadWeight: self._computed}
        own = {EmbeddingRows: self._stored, EmbeddingLowRank: self._stored, Bottleneck: torch.float32}
        dtype = (kind | own).get(type(delta), torch.float32)
        names = {id(getattr(delta, field.name)) for field in fields(delta) if field.name in _MATRICES}

        def rounded(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.long()
            return tensor.to(self._stored).to(dtype) if id(tensor) in names else tensor.float()

        return _mapped(delta, rounded)


def _mapped(part: PartT, change: Callable[[Tensor], Tensor]) -> PartT:
    """A delta, or a norm or gate in it, with each tensor changed."""
    changes: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, LayerNorm | Gate):
            changes[field.name] = _mapped(value, change)
        elif isinstance(value, Tensor):
            changes[field.name] = change(value)
    mapped: PartT = replace(part, **changes)
    return mapped


def _tensors_of(part: Any) -> list[Tensor]:
    """A delta's tensors, and those of norms and gates in it."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(part, note)
    return found


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """A tensor's place in a buffer of bytes."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
