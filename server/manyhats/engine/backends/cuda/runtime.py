"""What CUDA gives besides kernels: streams, events, pinned memory, copies that nothing waits for.

What is launched goes to the current stream unless another is named. Tests run the same code on a runtime that puts
operations off and checks that no memory is read, written or freed too early.
"""

from __future__ import annotations

import ctypes
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.choosing.wanted import Bytes


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Stream | None = None) -> None:
        """Put it behind everything in a stream so far; None for the current one."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has got there."""
        ...

    def query(self) -> bool:
        """Whether it has, without waiting."""
        ...


class Stream(Protocol):
    """A queue of the device's work, done in its order."""

    def wait(self, event: Event) -> None:
        """Have what comes later done after an event; the host does not wait."""
        ...


class HostMemory(Protocol):
    """Memory of the host, pinned where copies go on beside the host's work."""

    @property
    def tensor(self) -> Tensor:
        """[bytes] uint8, to copy from and to."""
        ...

    @property
    def array(self) -> Bytes:
        """The same, to read and write, while no copy that is launched does."""
        ...


class Runtime(Protocol):
    """One device."""

    @property
    def device(self) -> torch.device:
        """Its name."""
        ...

    def new_stream(self) -> Stream:
        """A stream beside the current one."""
        ...

    def new_event(self) -> Event:
        """An event that is not recorded yet."""
        ...

    def host_memory(self, num_bytes: int) -> HostMemory:
        """New memory, whose content is anything."""
        ...

    def copy(self, to: Tensor, source: Tensor, stream: Stream | None = None) -> None:
        """Launch a copy of as many bytes between the host's memory and the device's, in a stream or the current one."""
        ...


def runtime_on(device: torch.device) -> Runtime:
    """The runtime of a device; on the CPU, which tests use, everything is done at once."""
    return CudaRuntime(device) if device.type == "cuda" else CpuRuntime()


class TorchMemory:
    """``HostMemory`` by torch."""

    def __init__(self, num_bytes: int, *, is_pinned: bool) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.tensor.data_ptr())
        self.array: Bytes = np.ctypeslib.as_array(memory)  # what numpy() gives, which also waits for a device


class CudaRuntime:
    """``Runtime`` by torch.cuda.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_stream(self) -> Stream:
        """Of the device."""
        return _CudaStream(torch.cuda.Stream(self.device))

    def new_event(self) -> Event:
        """Without times."""
        return _CudaEvent()

    def host_memory(self, num_bytes: int) -> HostMemory:
        """Pinned."""
        return TorchMemory(num_bytes, is_pinned=True)

    def copy(self, to: Tensor, source: Tensor, stream: Stream | None = None) -> None:
        """As torch copies; what is not pinned is waited for."""
        with torch.cuda.stream(_stream_of(stream)):
            to.copy_(source, non_blocking=True)


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.torch = stream

    def wait(self, event: Event) -> None:
        self.torch.wait_event(cast(_CudaEvent, event).torch)


class _CudaEvent:
    def __init__(self) -> None:
        self.torch = torch.cuda.Event()

    def record(self, stream: Stream | None = None) -> None:
        self.torch.record(_stream_of(stream))

    def synchronize(self) -> None:
        self.torch.synchronize()

    def query(self) -> bool:
        return bool(self.torch.query())


def _stream_of(stream: Stream | None) -> torch.cuda.Stream | None:
    """None stands for the current one, to torch too."""
    return None if stream is None else cast(_CudaStream, stream).torch


class CpuRuntime:
    """``Runtime`` of the CPU: what is launched is done."""

    device = torch.device("cpu")

    def new_stream(self) -> Stream:
        """Nothing to wait for."""
        return _Done()

    def new_event(self) -> Event:
        """Nothing to wait for."""
        return _Done()

    def host_memory(self, num_bytes: int) -> HostMemory:
        """Not pinned."""
        return TorchMemory(num_bytes, is_pinned=False)

    def copy(self, to: Tensor, source: Tensor, stream: Stream | None = None) -> None:
        """Done on return."""
        to.copy_(source)


class _Done:
    """A stream and an event of the CPU."""

    def wait(self, event: Event) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True
