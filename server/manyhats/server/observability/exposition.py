"""Metrics as text: what a scrape is answered with."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from manyhats.server.observability.task_series import TaskMetric

_SLICE_S = 0.0005
_PAUSE_S = 0.0001
_END = b"# EOF\n"  # of OpenMetrics


class _Only(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


def exposition(collector: Collector, accept: str) -> tuple[str, bytes]:
    """Content type and text of metrics, in the format that the header ``accept`` prefers; "" for Prometheus' own.

    Made metric by metric, most in under a millisecond, with pauses, in which other threads take the interpreter's lock:
    none is given to a thread that waits for it less than 5 ms unless its holder sleeps.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is not a number
        encode, content_type = choose_encoder("text/plain")
    end = _END if content_type.startswith("application/openmetrics-text") else b""
    parts, began_s = [], time.perf_counter()
    for metric in collector.collect():
        if isinstance(metric, TaskMetric):
            parts.append(metric.text(is_open=bool(end)))
        else:
            parts.append(encode(_Only(metric)).removesuffix(end))
        if time.perf_counter() - began_s > _SLICE_S:
            time.sleep(_PAUSE_S)
            began_s = time.perf_counter()
    return content_type, b"".join(parts) + end
