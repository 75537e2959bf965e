"""The host's side of a step's two copies: of what is wanted, to the device, and of what was found, from it."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.choosing.wanted import Bytes
from manyhats.engine.backends.cuda.runtime import Runtime


def grown(num_bytes: int) -> int:
    """Room for at least this many bytes, over 0, such that memory grows rarely."""
    return 1 << (num_bytes - 1).bit_length()


class HostBytes:
    """Memory of the host that grows.

    Args:
        runtime: of the device it is copied from and to.
        room: bytes to begin with.
    """

    def __init__(self, runtime: Runtime, room: int) -> None:
        self._runtime = runtime
        self._size = room
        self._memory = runtime.host_memory(room)

    @property
    def tensor(self) -> Tensor:
        """To copy from and to."""
        return self._memory.tensor

    @property
    def array(self) -> Bytes:
        """To read and write while no copy that is launched does."""
        return self._memory.array

    def make_room(self, num_bytes: int) -> None:
        """Make room for this many; if that takes other memory, the content goes."""
        if self._size < num_bytes:
            self._size = grown(num_bytes)
            self._memory = self._runtime.host_memory(self._size)


class Exchange:
    """The memory of one step in flight, and the event at which what was found has come."""

    def __init__(self, runtime: Runtime, room: int) -> None:
        self.wants = HostBytes(runtime, room)
        self.found = HostBytes(runtime, room)
        self._event = runtime.new_event()

    def record(self) -> None:
        """Note that the copies are launched."""
        self._event.record()

    def wait(self) -> None:
        """Wait for them."""
        self._event.synchronize()
