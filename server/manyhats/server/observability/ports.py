"""Gauges of what the ports use: the files that they follow, and the HTTP port's connections, at each scrape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from manyhats.server.observability.gauges import gauge, single

if TYPE_CHECKING:
    from manyhats.server.access.tls import ServerTls
    from manyhats.server.access.tokens import TokenFile


class HttpConnections(Protocol):
    """What a port knows of its connections; readable from any thread."""

    @property
    def num_connections(self) -> int:
        """Those that are open."""

    @property
    def num_requests(self) -> int:
        """Requests whose answers are not complete."""

    @property
    def num_refused(self) -> int:
        """Connections that were closed as there were too many, so far."""


class PortMetrics(Collector):
    """Shows what is attached to it."""

    def __init__(self) -> None:
        self.tls: ServerTls | None = None
        self.tokens: TokenFile | None = None
        self.http: HttpConnections | None = None

    def describe(self) -> Iterator[Metric]:
        """Their names, by which a scrape may ask for them."""
        for name in (
            "manyhats_tls_not_after_timestamp_seconds",
            "manyhats_files_unreadable",
            "manyhats_http_connections",
            "manyhats_http_requests_in_flight",
            "manyhats_http_connections_refused_total",
        ):
            yield GaugeMetricFamily(name, "")

    def collect(self) -> Iterator[Metric]:
        """All of what is attached."""
        if self.tls is not None:
            yield gauge(
                "manyhats_tls_not_after_timestamp_seconds",
                "When the first certificate of a file expires.",
                ["file"],
                [((each.setting,), each.ends.timestamp()) for each in self.tls.current.validities],
            )
        followed = {"tls": self.tls, "tokens": self.tokens}
        yield gauge(
            "manyhats_files_unreadable",
            "1 if the files have changed and cannot be used as they are: their previous content is.",
            ["files"],
            [((name,), float(each.is_outdated)) for name, each in followed.items() if each is not None],
        )
        if self.http is not None:
            yield from _http_gauges(self.http)


def _http_gauges(http: HttpConnections) -> Iterator[Metric]:
    yield single("manyhats_http_connections", "Open connections of the HTTP port.", http.num_connections)
    yield single(
        "manyhats_http_requests_in_flight",
        "Requests of the HTTP port that are not answered yet, a scrape there among them.",
        http.num_requests,
    )
    yield CounterMetricFamily(
        "manyhats_http_connections_refused",
        "Connections of the HTTP port closed because there were too many: new ones, or the oldest idle ones.",
        value=http.num_refused,
    )
