"""Metrics as text: what a scrape is answered with."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from manyhats.server.observability.task_histogram import TaskMetric

_END = b"# EOF\n"  # of OpenMetrics


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def exposition(collector: Collector, accept: str) -> tuple[str, bytes]:
    """Content type and text of metrics, in the format that the header ``accept`` prefers; "" for Prometheus' own."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is not a number
        encode, content_type = choose_encoder("text/plain")
    metrics = list(collector.collect())
    others = encode(_Collected(metric for metric in metrics if not isinstance(metric, TaskMetric)))
    by_task = "".join(metric.text() for metric in metrics if isinstance(metric, TaskMetric)).encode()
    end = _END if others.endswith(_END) else b""
    return content_type, others.removesuffix(end) + by_task + end
