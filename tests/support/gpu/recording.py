"""Graphs without a GPU: functions that are kept, and run again on the memory that they saw."""

from __future__ import annotations

from collections.abc import Callable

from manyhats.engine.backends.cuda.graphs import Graph


class Replayed:
    """A recorded function, which sees the memory that it saw when it was recorded, whatever is there now."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self._launch()


class Recorder:
    """``Capture`` without a GPU; recording a launch does not run it."""

    def __init__(self) -> None:
        self.graphs: list[Replayed] = []

    def __call__(self, launch: Callable[[], None]) -> Graph:
        self.graphs.append(Replayed(launch))
        return self.graphs[-1]

    @property
    def num_replays(self) -> int:
        return sum(graph.count for graph in self.graphs)
