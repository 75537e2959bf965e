"""How long calls take on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from manyhats.engine.backends.cuda.graphs import CapturingOnGpu

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one call; ``is_graph`` if launches by the host are not among them."""

    seconds: float
    is_graph: bool


class Timer:
    """Times calls that launch work and do not wait for it.

    On a GPU the calls are captured in one graph, whose replays are timed by events: a launch from Python takes longer
    than many kernels run. Calls that cannot be captured are timed as they are launched. On the CPU they are timed by
    the clock.

    Args:
        device: where they run.
        repeats: the median of so many.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        # Not torch.cuda.graph, which collects garbage each time: that takes longer than most measurements.
        self._capture = CapturingOnGpu(device) if device.type == "cuda" else None
        self._repeats = repeats

    def time(self, calls: Sequence[Call]) -> Timed:
        """The mean of these calls, one after another; they run once to warm up."""
        if self._capture is None:
            return Timed(self._by_clock(calls) / len(calls), is_graph=False)
        for call in calls:
            call()
        torch.cuda.synchronize()
        try:
            run, is_graph = self._capture(lambda: _run(calls)).replay, True
        except RuntimeError:  # what cannot be captured, such as an allocation of the driver's
            torch.cuda.synchronize()
            run, is_graph = lambda: _run(calls), False
        run()
        seconds = median(event_seconds(run) for _ in range(self._repeats))
        return Timed(seconds / len(calls), is_graph)

    def _by_clock(self, calls: Sequence[Call]) -> float:
        times = []
        for _ in range(self._repeats):
            began = time.perf_counter()
            _run(calls)
            times.append(time.perf_counter() - began)
        return median(times)


def event_seconds(run: Callable[[], object]) -> float:
    """From the begin of what it launches to the end, on a GPU."""
    begin, end = event(), event()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def event() -> Any:
    """One that has a time."""
    return torch.cuda.Event(enable_timing=True)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
