"""Gauges of what there is now, read at each scrape."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.engine.residency.tiers import DeviceBytes, Tier
from manyhats.server.observability import gateway
from manyhats.server.observability.gauges import gauge, single
from manyhats.server.observability.task_labels import TaskLabels, TaskVersions

if TYPE_CHECKING:
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.store_health import StoreHealth

_VERSION = version("manyhats")

_LIVE = (
    "manyhats_ready",
    "manyhats_adapters",
    "manyhats_build_info",
    "manyhats_requests_running",
    "manyhats_requests_waiting",
    "manyhats_kv_cache_usage_ratio",
    "manyhats_kv_blocks",
    "manyhats_model_bytes",
    "manyhats_engine_heartbeat_timestamp_seconds",
    "manyhats_adapter_resident",
    "manyhats_store_usable",
    "manyhats_store_last_success_timestamp_seconds",
    "manyhats_store_failures_total",
    "manyhats_adapter_pinned",
    "manyhats_adapter_pinned_bytes",
    "manyhats_adapter_evictions_total",
    "manyhats_adapter_device_bytes",
    "manyhats_adapter_copied_bytes_total",
    *gateway.NAMES,
)


class LiveMetrics:
    """Gauges read at each scrape from engine snapshots, which never wait for a step."""

    def __init__(self, versions: TaskVersions, labels: TaskLabels, clock: Callable[[], float]) -> None:
        self.backend: Backend | None = None
        self.is_ready: Callable[[], bool] = lambda: False
        self._versions = versions
        self._labels = labels
        self._clock = clock

    def describe(self) -> Iterator[Metric]:
        """Their names, by which a scrape may ask for them."""
        for name in _LIVE:
            yield GaugeMetricFamily(name, "")

    def collect(self) -> Iterator[Metric]:
        """All gauges; those of the engine once there is one."""
        backend, records = self.backend, self._versions.records()
        yield single(
            "manyhats_ready", "Whether a request would be served, as /readyz says.", float(self.is_ready())
        )
        states = Tally(record.state for record in records)
        counts = [((state.name.lower(),), states[state]) for state in AdapterState]
        yield gauge("manyhats_adapters", "Adapter versions in the store, by state.", ["state"], counts)
        if backend is None:
            yield gateway.adapter_gauge(0, (), (), (), self._clock())
            return
        tiers = backend.engine.adapter_tiers()
        residents = [(record, tiers[record.digest]) for record in records if record.digest in tiers]
        placed = (record for record, tier in residents if tier is Tier.DEVICE)
        yield _build_info(backend)
        yield from self._engine_gauges(backend)
        yield self._resident_gauge(residents)
        yield from _store_metrics(backend.store_health)
        pinned = backend.engine.pinned_digests()
        yield self._pinned_gauge(record for record, _ in residents if record.digest in pinned)
        evictions = CounterMetricFamily(
            "manyhats_adapter_evictions", "Adapters that made room in a tier.", labels=["tier"]
        )
        residency = backend.engine.residency_stats
        evictions.add_metric([Tier.DEVICE.value], residency.num_slot_evictions)
        evictions.add_metric([Tier.HOST.value], residency.num_evictions)
        yield evictions
        yield single("manyhats_adapter_pinned_bytes", "Bytes of pinned adapters.", residency.pinned_bytes)
        if residency.device is not None:
            yield from _device_metrics(residency.device)
        yield from gateway.load_gauges(backend)
        waiting = backend.engine.stats.waiting_adapters
        yield gateway.adapter_gauge(backend.limits.max_adapters, placed, waiting, records, self._clock())

    def _engine_gauges(self, backend: Backend) -> Iterator[Metric]:
        stats = backend.engine.stats
        total, used, cached = stats.kv_blocks_total, stats.kv_blocks_used, stats.kv_blocks_cached
        blocks = [(("used",), used), (("cached",), cached), (("free",), total - used - cached)]
        parts = [((part,), num_bytes) for part, num_bytes in backend.engine.model_bytes.items()]
        yield single("manyhats_requests_running", "Sequences that hold KV blocks.", stats.num_running)
        yield single(
            "manyhats_requests_waiting",
            "Sequences that wait for a first step, and requests for their adapter or constraint.",
            stats.num_waiting,
        )
        yield single(
            "manyhats_kv_cache_usage_ratio", "KV blocks in use, of all; 0 to 1.", used / max(total, 1)
        )
        yield gauge(
            "manyhats_kv_blocks", "KV blocks: used, cached (free, with a prefix) or free.", ["state"], blocks
        )
        yield gauge("manyhats_model_bytes", "Bytes in memory, by part of the model.", ["part"], parts)
        yield single(
            "manyhats_engine_heartbeat_timestamp_seconds", "When the engine last turned.", stats.heartbeat_s
        )

    def _resident_gauge(self, residents: Iterable[tuple[AdapterRecord, Tier]]) -> Metric:
        counts = Tally((self._labels.label(record.task_id), tier.value) for record, tier in residents)
        values = list(counts.items())
        return gauge("manyhats_adapter_resident", "Loaded versions, by task.", ["task", "tier"], values)

    def _pinned_gauge(self, pinned: Iterable[AdapterRecord]) -> Metric:
        counts = Tally(self._labels.label(record.task_id) for record in pinned if record.is_pinned)
        values = [((label,), count) for label, count in counts.items()]
        return gauge("manyhats_adapter_pinned", "Pinned versions in memory, by task.", ["task"], values)


def _device_metrics(device: DeviceBytes) -> Iterator[Metric]:
    states = [(("used",), device.used), (("free",), device.free)]
    yield gauge(
        "manyhats_adapter_device_bytes", "A GPU's memory for adapters: used or free.", ["state"], states
    )
    yield CounterMetricFamily(
        "manyhats_adapter_copied_bytes", "Bytes of adapters copied to a GPU.", value=device.copied
    )


def _build_info(backend: Backend) -> Metric:
    """1, with what is running here as its labels."""
    info = backend.info
    values = (_VERSION, info.name, info.quantization, info.device)
    labels = ["version", "base", "quantization", "device"]
    return gauge("manyhats_build_info", "The server's version and its base model.", labels, [(values, 1)])


def _store_metrics(store: StoreHealth) -> Iterator[Metric]:
    yield gauge(
        "manyhats_store_usable",
        "Whether the store can be used: its catalogue, and to read and write adapters.",
        ["use"],
        [((use,), float(is_usable)) for use, is_usable in store.usable.items()],
    )
    yield gauge(
        "manyhats_store_last_success_timestamp_seconds",
        "When it last could; since then, other servers' changes are not seen, if the use is the catalogue.",
        ["use"],
        [((use.value,), when_s) for use, when_s in store.last_success_s.items()],
    )
    failures = CounterMetricFamily(
        "manyhats_store_failures", "Looks at the store that failed or did not return.", labels=["use"]
    )
    for use, count in store.num_failures.items():
        failures.add_metric([use.value], count)
    yield failures
