"""The host's side of a step's two copies: of what is wanted, to the device, and of what was found, from it."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.wanted import Bytes


def grown(num_bytes: int) -> int:
    """Room for at least this many bytes, over 0, such that memory grows rarely."""
    return 1 << (num_bytes - 1).bit_length()


class HostBytes:
    """Memory of the host as a tensor and as an array; pinned, so that copies go on beside the host's work."""

    def __init__(self, is_pinned: bool, room: int) -> None:
        self._is_pinned = is_pinned
        self.tensor: Tensor
        self.array: Bytes
        self._allocate(room)

    def make_room(self, num_bytes: int) -> None:
        """Make room for this many; if that takes other memory, the content goes."""
        if len(self.array) < num_bytes:
            self._allocate(grown(num_bytes))

    def _allocate(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        memory = (ctypes.c_uint8 * size).from_address(self.tensor.data_ptr())
        self.array = np.ctypeslib.as_array(memory)  # what numpy() gives, which also waits for a device


class Exchange:
    """The memory of one step in flight, and the event at which what was found has come."""

    def __init__(self, device: torch.device, room: int) -> None:
        is_cuda = device.type == "cuda"
        self.wants = HostBytes(is_cuda, room)
        self.found = HostBytes(is_cuda, room)
        self._event = torch.cuda.Event() if is_cuda else None

    def record(self) -> None:
        """Note that the copies are launched."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
