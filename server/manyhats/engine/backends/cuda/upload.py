"""A step's numbers on their way to the device: arrays end to end in pinned memory, and one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.choosing.wanted import Field, fields_of
from manyhats.engine.backends.cuda.exchange import HostBytes, grown
from manyhats.engine.backends.cuda.runtime import Event, Runtime
from manyhats.engine.backends.wants import Array

_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


class Uploads:
    """Sends one step after another through one buffer on the device.

    A step's numbers are valid until the next one's are sent, which the device does after everything launched before.

    Args:
        runtime: of the device.
        room: bytes to begin with.
    """

    def __init__(self, runtime: Runtime, room: int = 1 << 16) -> None:
        self._runtime = runtime
        self._room = room
        self._there = torch.empty(room, dtype=torch.uint8, device=runtime.device)
        self._sent: list[_Sent] = []

    def send(self, arrays: Mapping[str, Array], room: Mapping[str, tuple[int, ...]] | None = None) -> Views:
        """Launch the copy of some arrays.

        Args:
            arrays: int32, int64 or float32.
            room: larger shapes that some take there; what they do not fill is 0.
        """
        shapes = [((room or {}).get(name, array.shape), array.dtype) for name, array in arrays.items()]
        fields = dict(zip(arrays, fields_of(shapes), strict=True))
        num_bytes = max((field.end for field in fields.values()), default=0)
        sent = self._free()
        sent.host.make_room(num_bytes)
        for name, array in arrays.items():
            _write(fields[name].of(sent.host.array), array)
        if len(self._there) < num_bytes:
            self._there = self._there.new_empty(grown(num_bytes))
        self._runtime.copy(self._there[:num_bytes], sent.host.tensor[:num_bytes])
        sent.copied.record()
        return Views(self._there, fields)

    def _free(self) -> _Sent:
        """Pinned memory that no copy still reads."""
        found = next((sent for sent in self._sent if sent.copied.query()), None)
        if found is None:
            found = _Sent(HostBytes(self._runtime, self._room), self._runtime.new_event())
            self._sent.append(found)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Arrays on the device, by name."""

    buffer: Tensor
    fields: Mapping[str, Field]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __getitem__(self, name: str) -> Tensor:
        field = self.fields[name]
        return self.buffer[field.place : field.end].view(_DTYPES[field.dtype]).view(field.shape)

    def under(self, name: str) -> dict[str, Tensor]:
        """Those whose names begin with this one and a dot, by what follows."""
        first = f"{name}."
        return {each.removeprefix(first): self[each] for each in self.fields if each.startswith(first)}


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """Pinned memory, and the event behind the last copy from it."""

    host: HostBytes
    copied: Event


def _write(to: Array, array: Array) -> None:
    """An array at the beginning of one of the same dimensions, and zeros behind."""
    if to.shape == array.shape:
        to[...] = array
        return
    to.fill(0)
    to[tuple(slice(0, size) for size in array.shape)] = array
