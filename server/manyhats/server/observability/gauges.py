"""Gauges as they are at a scrape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric


def gauge(
    name: str, help_text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> Metric:
    """A gauge with a series for each of ``values``: the labels' values, and the series'."""
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def single(name: str, help_text: str, value: float) -> Metric:
    """A gauge of one series without labels."""
    return GaugeMetricFamily(name, help_text, value=value)
