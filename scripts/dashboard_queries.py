"""What the dashboard asks of Prometheus: of the servers and tasks that its reader has selected."""

from __future__ import annotations

from grafana_panels import Query

SERVERS = 'instance=~"$instance"'
TASKS = f'{SERVERS}, task=~"$task"'


def rate(name: str, labels: str = SERVERS) -> str:
    """A counter's increase per second."""
    return f"rate(manyhats_{name}{{{labels}}}[$__rate_interval])"


def total_rate(name: str, labels: str = SERVERS, by: str = "") -> str:
    """``rate`` of all series together, or of those that have the same labels ``by``."""
    return f"sum{f' by ({by})' if by else ''} ({rate(name, labels)})"


def quantile(share: float, name: str, labels: str = SERVERS, by: str = "") -> str:
    """What that share of a histogram's amounts does not exceed."""
    names = f"{by}, le" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({names}) ({rate(f'{name}_bucket', labels)}))"


def quantiles(name: str, labels: str = SERVERS) -> list[Query]:
    """Median, 95th and 99th percentile of a histogram."""
    return [Query(quantile(share, name, labels), f"p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)]


def mean(name: str) -> str:
    """The mean of a histogram's amounts."""
    return f"{total_rate(f'{name}_sum')} / {total_rate(f'{name}_count')}"


def gauge(name: str, by: str = "", labels: str = SERVERS, how: str = "sum") -> str:
    """A gauge of all servers."""
    return f"{how}{f' by ({by})' if by else ''} (manyhats_{name}{{{labels}}})"
