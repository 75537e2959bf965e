"""Counters and histograms by task: cheap to count a token in, and to write out for hundreds of tasks at each scrape.

prometheus_client's own take 5 µs a series and scrape, under the interpreter lock: eighty series a task add up to a
pause of all streams (decision 35).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


class Series(Protocol):
    """What there is of one task. One thread counts; any may read."""

    def lines(self) -> Iterable[str]:
        """As both of Prometheus' text formats have it."""

    def samples(self) -> Iterable[Sample]:
        """As its library has it."""


class CounterSeries:
    """How often something has come."""

    __slots__ = ("_head", "_labels", "_name", "_value")

    def __init__(self, name: str, labels: Mapping[str, str]) -> None:
        self._name = f"{name}_total"
        self._labels = labels
        self._value = 0
        self._head = f"{self._name}{{{_shown(labels)}}} "

    def inc(self, amount: int = 1) -> None:
        """Count so many more."""
        self._value += amount

    def lines(self) -> Iterable[str]:
        """One."""
        return (f"{self._head}{self._value}\n",)

    def samples(self) -> Iterable[Sample]:
        """One."""
        return (Sample(self._name, dict(self._labels), self._value),)


class HistogramSeries:
    """How often amounts have come, by their size."""

    __slots__ = ("_bounds", "_counts", "_heads", "_name", "_sum", "_task")

    def __init__(self, name: str, task: str, bounds: Sequence[float]) -> None:
        self._name, self._task = name, task
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        buckets = (f"{name}_bucket{{{_shown(self._bucket(bound))}}} " for bound in (*bounds, inf))
        labels = _shown({"task": task})
        self._heads = (*buckets, f"{name}_count{{{labels}}} ", f"{name}_sum{{{labels}}} ")

    def observe(self, amount: float, times: int = 1) -> None:
        """Count an amount, which came several times."""
        self._counts[bisect_left(self._bounds, amount)] += times
        self._sum += amount * times

    def lines(self) -> Iterator[str]:
        """Of buckets, then their count and sum."""
        counts = self._cumulative()
        for head, value in zip(self._heads, (*counts, counts[-1], self._sum), strict=True):
            yield f"{head}{value}\n"

    def samples(self) -> Iterator[Sample]:
        """The same."""
        counts, labels = self._cumulative(), {"task": self._task}
        for bound, count in zip((*self._bounds, inf), counts, strict=True):
            yield Sample(f"{self._name}_bucket", self._bucket(bound), count)
        yield Sample(f"{self._name}_count", labels, counts[-1])
        yield Sample(f"{self._name}_sum", labels, self._sum)

    def _bucket(self, bound: float) -> dict[str, str]:
        return {"le": "+Inf" if bound == inf else repr(bound), "task": self._task}

    def _cumulative(self) -> list[int]:
        """For each bucket, how many amounts were at most its bound; the last has all."""
        total, found = 0, []
        for count in self._counts.copy():  # at once: meanwhile others are counted
            total += count
            found.append(total)
        return found


class TaskCounter(Collector):
    """A counter with the label ``task``, and others after it.

    Args:
        name: of the metric, without ``_total``.
        help_text: what it is.
        others: names of the other labels, of whose values there are few.
    """

    def __init__(self, name: str, help_text: str, *others: str) -> None:
        self._described = name, help_text, "counter"
        self._labels = ("task", *others)
        self._series: dict[tuple[str, ...], CounterSeries] = {}

    def series(self, *values: str) -> CounterSeries:
        """The series of a task and other labels' values, from now on there."""
        found = self._series.get(values)
        if found is None:
            labels = dict(zip(self._labels, values, strict=True))
            found = self._series[values] = CounterSeries(self._described[0], labels)
        return found

    def remove(self, task: str) -> None:
        """Forget a task's."""
        for values in [values for values in self._series if values[0] == task]:
            del self._series[values]

    def describe(self) -> Iterable[Metric]:
        """Its name, by which a scrape may ask for it."""
        return [Metric(*self._described)]

    def collect(self) -> Iterable[Metric]:
        """All its series."""
        return [TaskMetric(*self._described, tuple(self._series.copy().values()))]


class TaskHistogram(Collector):
    """A histogram with the label ``task``.

    Args:
        name: of the metric.
        help_text: what it is.
        bounds: the largest amount of each bucket, rising; the last bucket has no bound.
    """

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._described = name, help_text, "histogram"
        self._bounds = tuple(map(float, bounds))
        self._series: dict[str, HistogramSeries] = {}

    def series(self, task: str) -> HistogramSeries:
        """The series of a task, from now on there."""
        found = self._series.get(task)
        if found is None:
            found = self._series[task] = HistogramSeries(self._described[0], task, self._bounds)
        return found

    def remove(self, task: str) -> None:
        """Forget a task's."""
        self._series.pop(task, None)

    def describe(self) -> Iterable[Metric]:
        """Its name, by which a scrape may ask for it."""
        return [Metric(*self._described)]

    def collect(self) -> Iterable[Metric]:
        """All its series."""
        return [TaskMetric(*self._described, tuple(self._series.copy().values()))]


class TaskMetric(Metric):
    """A metric by task at a scrape, which is text sooner than samples."""

    def __init__(self, name: str, help_text: str, kind: str, series: Sequence[Series]) -> None:
        super().__init__(name, help_text, kind)
        self._series = series
        del self.samples  # they are made when they are asked for

    def __getattr__(self, name: str) -> list[Sample]:
        if name != "samples":
            raise AttributeError(name)
        self.samples = [sample for series in self._series for sample in series.samples()]
        return self.samples

    def text(self, *, is_open: bool) -> bytes:
        """In Prometheus' own format, or in OpenMetrics, which calls counters by another name."""
        name = self.name if is_open or self.type != "counter" else f"{self.name}_total"
        head = f"# HELP {name} {self.documentation}\n# TYPE {name} {self.type}\n"
        lines = (line for series in self._series for line in series.lines())
        return "".join((head, *lines)).encode()


def _shown(labels: Mapping[str, str]) -> str:
    """Labels as text. Tasks are called by their ids, or by a word that begins with _: nothing needs an escape."""
    return ",".join(f'{name}="{value}"' for name, value in labels.items())
