"""Histograms by task: cheap to count a token in, and to write out for hundreds of tasks at each scrape.

prometheus_client's own take 5 µs a series and scrape, under the interpreter lock: seventy series a task add up to a
pause of all streams.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from math import inf

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


class TaskSeries:
    """One task's observations. One thread observes; any may read."""

    __slots__ = ("_bounds", "_counts", "_heads", "_sum")

    def __init__(self, name: str, label: str, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        # Labels of tasks are task ids, or begin with _: nothing in them needs an escape.
        buckets = (f'{name}_bucket{{le="{_shown(bound)}",task="{label}"}} ' for bound in (*bounds, inf))
        self._heads = (*buckets, f'{name}_count{{task="{label}"}} ', f'{name}_sum{{task="{label}"}} ')

    def observe(self, amount: float, times: int = 1) -> None:
        """Count an amount, which came several times."""
        self._counts[bisect_left(self._bounds, amount)] += times
        self._sum += amount * times

    @property
    def sum(self) -> float:
        """Of all amounts."""
        return self._sum

    def cumulative(self) -> list[int]:
        """For each bucket, how many amounts were at most its bound; the last has all."""
        total, found = 0, []
        for count in self._counts.copy():  # at once: meanwhile others are counted
            total += count
            found.append(total)
        return found

    def lines(self) -> Iterator[str]:
        """The lines of an exposition."""
        counts = self.cumulative()
        for head, value in zip(self._heads, (*counts, counts[-1], self._sum), strict=True):
            yield f"{head}{value}\n"


class TaskHistogram(Collector):
    """A histogram with the label ``task``.

    Args:
        name: of the metric.
        help_text: what it is.
        bounds: the largest amount of each bucket, rising; the last bucket has no bound.
    """

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help_text = help_text
        self.bounds = tuple(map(float, bounds))
        self._series: dict[str, TaskSeries] = {}

    def series(self, label: str) -> TaskSeries:
        """The series of a task, from now on there."""
        found = self._series.get(label)
        if found is None:
            found = self._series[label] = TaskSeries(self.name, label, self.bounds)
        return found

    def remove(self, label: str) -> None:
        """Forget a task's."""
        self._series.pop(label, None)

    def describe(self) -> Iterable[Metric]:
        """Its name, by which a scrape may ask for it."""
        return [Metric(self.name, self.help_text, "histogram")]

    def collect(self) -> Iterable[Metric]:
        """All its series."""
        return [TaskMetric(self, self._series.copy())]


class TaskMetric(Metric):
    """A histogram by task at a scrape, which is text sooner than samples."""

    def __init__(self, histogram: TaskHistogram, series: dict[str, TaskSeries]) -> None:
        super().__init__(histogram.name, histogram.help_text, "histogram")
        self._bounds = histogram.bounds
        self._series = series
        del self.samples  # they are made when they are asked for

    def __getattr__(self, name: str) -> list[Sample]:
        if name != "samples":
            raise AttributeError(name)
        self.samples = list(self._samples())
        return self.samples

    def _samples(self) -> Iterator[Sample]:
        for label, series in self._series.items():
            counts, task = series.cumulative(), {"task": label}
            for bound, count in zip((*self._bounds, inf), counts, strict=True):
                yield Sample(f"{self.name}_bucket", {**task, "le": _shown(bound)}, count)
            yield Sample(f"{self.name}_count", task, counts[-1])
            yield Sample(f"{self.name}_sum", task, series.sum)

    def text(self) -> bytes:
        """As both of Prometheus' text formats have it."""
        head = f"# HELP {self.name} {self.documentation}\n# TYPE {self.name} histogram\n"
        lines = (line for series in self._series.values() for line in series.lines())
        return "".join((head, *lines)).encode()


def _shown(bound: float) -> str:
    return "+Inf" if bound == inf else repr(bound)
