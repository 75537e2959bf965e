"""Slots of a device with memory of its own, and a copier that works when the test says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from manyhats.engine.backends.cuda.arena import ALIGNMENT, Arena, Region


@dataclass(frozen=True)
class Units:
    """A packed adapter of some units of the arena."""

    name: str
    num_units: int

    @property
    def num_bytes(self) -> int:
        return self.num_units * ALIGNMENT


class ArenaSlots:
    """``AdapterSlots``, and their memory, on an arena. ``fails`` makes the next copy fail."""

    def __init__(self, num_units: int) -> None:
        self.arena = Arena(num_units * ALIGNMENT)
        self.num_bytes = num_units * ALIGNMENT
        self.num_copied_bytes = 0
        self.held: dict[int, tuple[Units, Region]] = {}
        self.named: set[int] = set()
        self.fails: Exception | None = None
        self.on_copy: Callable[[], None] = lambda: None

    @property
    def memory(self) -> ArenaSlots:
        return self

    @property
    def num_free_bytes(self) -> int:
        return self.arena.num_free_bytes

    @property
    def names(self) -> dict[int, str]:
        return {slot: packed.name for slot, (packed, _) in self.held.items()}

    def bytes_of(self, packed: Units) -> int:
        return packed.num_bytes

    def evictions(self, num_bytes: int, idle: Sequence[int]) -> list[int] | None:
        regions = [self.held[slot][1] for slot in idle]
        evicted = self.arena.evictions(num_bytes, regions)
        return None if evicted is None else [slot for slot in idle if self.held[slot][1] in evicted]

    def place(self, slot: int, packed: Units) -> None:
        assert slot > 0, "slot 0 is the base model"
        assert slot not in self.held, "written over"
        assert slot not in self.named, "a step that names it is left to run"
        self.on_copy()
        failure, self.fails = self.fails, None
        if failure is not None:
            raise failure
        self.held[slot] = packed, self.arena.allocate(packed.num_bytes)
        self.num_copied_bytes += packed.num_bytes

    def clear(self, slot: int) -> None:
        assert slot not in self.named, "a step that names it is left to run"
        _, region = self.held.pop(slot)
        self.arena.free(region)


class Copier(Executor):
    """A thread that works when it is told to, or when somebody waits for what it was given."""

    def __init__(self) -> None:
        self._tasks: list[Callable[[], None]] = []

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = _Awaited(self)

        def task() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 as an executor does
                future.set_exception(error)

        self._tasks.append(task)
        return future

    def work(self) -> None:
        """Do the next one, if there is one."""
        if self._tasks:
            self._tasks.pop(0)()


class _Awaited(Future[Any]):
    def __init__(self, copier: Copier) -> None:
        super().__init__()
        self._copier = copier

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            self._copier.work()
        return super().result(timeout)
