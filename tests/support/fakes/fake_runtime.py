"""A device that puts its work off: any legal order of what is launched, and no memory touched too early.

Operations wait in their streams. Whenever something is launched or waited for, some of them run, in an order that a
seed gives and that streams and events allow. Beside this, each operation names the memory that it reads and writes, and
vector clocks tell what is known to be done, so what could go wrong in some order raises in every one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.choosing.wanted import Bytes

POISON = 0xA5
Touched = tuple[int, int, bool]
"""Where memory begins and ends, and whether it is written."""


class LifetimeError(AssertionError):
    """Memory was read, written or freed while an operation that is not known to be done has it."""


class _Operation:
    __slots__ = ("clock", "deliver", "index", "is_done", "run", "stream", "touched", "waits_for")

    def __init__(
        self,
        stream: int,
        run: Callable[[], None] | None,
        touched: Sequence[Touched],
        waits_for: _Operation | None = None,
    ) -> None:
        self.stream = stream
        self.run = run
        self.touched = touched
        self.waits_for = waits_for
        self.deliver: Callable[[], None] | None = None  # to the host, once that knows
        self.is_done = False
        self.index = 0
        self.clock: list[int] = []

    def conflicts(self, touched: Sequence[Touched]) -> bool:
        """Whether one of both writes what the other has."""
        for begin, end, is_written in self.touched:
            for other_begin, other_end, other_is_written in touched:
                if begin < other_end and other_begin < end and (is_written or other_is_written):
                    return True
        return False


class FakeRuntime:
    """``Runtime`` on the CPU. The current stream is number 0.

    Args:
        seed: of the order in which operations run.
        num_streams: at most.

    Attributes:
        on_wait: called whenever the host waits, before anything is done: what other threads do in the meantime.
        fault: the last error of a lifetime, whoever has caught it.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int, num_streams: int = 3) -> None:
        self.on_wait: Callable[[], None] = lambda: None
        self._random = Random(seed)
        self._queues: list[deque[_Operation]] = [deque() for _ in range(num_streams)]
        self._clocks = [[0] * num_streams for _ in range(num_streams)]
        self._host = [0] * num_streams
        self._unknown: list[_Operation] = []  # not known by the host to be done
        self._host_memory: dict[int, Tensor] = {}
        self._num_streams = 1
        self.fault: LifetimeError | None = None

    # What Runtime has

    def new_stream(self) -> FakeStream:
        self._num_streams += 1
        return FakeStream(self, self._num_streams - 1)

    def new_event(self) -> FakeEvent:
        return FakeEvent(self)

    def host_memory(self, num_bytes: int) -> FakeMemory:
        memory = FakeMemory(self, num_bytes)
        self._host_memory[memory.tensor.data_ptr()] = memory.tensor
        return memory

    def copy(self, to: Tensor, source: Tensor, stream: FakeStream | None = None) -> None:
        target, given = to.numpy(), source.numpy()
        assert target.nbytes == given.nbytes
        expected = given.copy() if self._is_of_host(source) else None
        found: list[Bytes] = []

        def run() -> None:
            if expected is not None and not np.array_equal(expected, given):
                raise self._fault("a copy's source was rewritten before it ran")
            if is_to_host:
                found.append(given.copy())
            else:
                target[:] = given

        is_to_host = self._is_of_host(to)
        if is_to_host:
            self.check_unnamed(to)
            target[:] = POISON
        operation = self.launch(run, [source], [to], stream)
        if is_to_host:
            operation.deliver = lambda: np.copyto(target, found[0])

    # What kernels and tests use

    def launch(
        self,
        run: Callable[[], None] | None,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        stream: FakeStream | None = None,
        waits_for: _Operation | None = None,
    ) -> _Operation:
        """Queue an operation, whose memory nothing that is not done before may have."""
        number = 0 if stream is None else stream.number
        new = _Operation(number, run, _touched(reads, False) + _touched(writes, True), waits_for)
        clock = self._clocks[number]
        before = self._host if waits_for is None else waits_for.clock
        clock[:] = map(max, clock, before, self._host)
        for other in self._unknown:
            if other.index > clock[other.stream] and other.conflicts(new.touched):
                raise self._fault("an operation has memory of another that may be under way")
        clock[number] += 1
        new.index, new.clock = clock[number], clock.copy()
        self._queues[number].append(new)
        self._unknown.append(new)
        self._run_some()
        return new

    def check_unnamed(self, memory: Tensor) -> None:
        """Check that no operation that may be under way has this memory, so that it may be freed or rewritten."""
        place = _touched([memory], True)
        for operation in self._unknown:
            if operation.conflicts(place):
                raise self._fault("memory is freed, read or rewritten that an operation has")

    def finish(self) -> None:
        """Run what is left."""
        while self._run_one():
            pass
        self._learn([1 << 60] * len(self._host))

    # Inside

    def _fault(self, message: str) -> LifetimeError:
        self.fault = LifetimeError(message)
        return self.fault

    def _is_of_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._host_memory

    def done(self, operation: _Operation) -> None:
        """Note that the host knows of an operation's end."""
        self._learn(operation.clock)

    def wait_for(self, operation: _Operation) -> None:
        """Run others until an operation is done, which the host knows then."""
        self.on_wait()
        while not operation.is_done:
            assert self._run_one(), "waits for ever"
        self._learn(operation.clock)

    def _learn(self, clock: Sequence[int]) -> None:
        host = self._host = list(map(max, self._host, clock))
        unknown = []
        for operation in self._unknown:
            if operation.index > host[operation.stream]:
                unknown.append(operation)
            elif operation.deliver is not None:
                operation.deliver()
        self._unknown = unknown

    def _run_some(self) -> None:
        for _ in range(self._random.choice((0, 0, 1, 1, 2, 5))):
            if not self._run_one():
                return

    def _run_one(self) -> bool:
        """Run one that its stream and its event allow; False if there is none."""
        ready = [
            queue
            for queue in self._queues
            if queue and (queue[0].waits_for is None or queue[0].waits_for.is_done)
        ]
        if not ready:
            return False
        operation = (ready[0] if len(ready) == 1 else self._random.choice(ready)).popleft()
        if operation.run is not None:
            operation.run()
        operation.is_done = True
        return True


class FakeStream:
    """``Stream`` of a ``FakeRuntime``."""

    def __init__(self, runtime: FakeRuntime, number: int) -> None:
        self.number = number
        self._runtime = runtime

    def wait(self, event: FakeEvent) -> None:
        if event.mark is not None:
            self._runtime.launch(None, stream=self, waits_for=event.mark)


class FakeEvent:
    """``Event`` of a ``FakeRuntime``."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.mark: _Operation | None = None
        self._runtime = runtime

    def record(self, stream: FakeStream | None = None) -> None:
        self.mark = self._runtime.launch(None, stream=stream)

    def synchronize(self) -> None:
        if self.mark is not None:
            self._runtime.wait_for(self.mark)

    def query(self) -> bool:
        if self.mark is not None and not self.mark.is_done:
            return False
        if self.mark is not None:
            self._runtime.done(self.mark)
        return True


class FakeMemory:
    """``HostMemory`` whose array may be touched while no copy has it."""

    def __init__(self, runtime: FakeRuntime, num_bytes: int) -> None:
        self.tensor = torch.full((num_bytes,), POISON, dtype=torch.uint8)
        self._runtime = runtime
        self._array: Bytes = self.tensor.numpy()

    @property
    def array(self) -> Bytes:
        self._runtime.check_unnamed(self.tensor)
        return self._array


def _touched(tensors: Sequence[Tensor], is_written: bool) -> list[Touched]:
    return [(begin := tensor.data_ptr(), begin + tensor.nbytes, is_written) for tensor in tensors]
