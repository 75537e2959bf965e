"""What the server counts: names, labels, buckets, and how they are updated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.output import StepOutput, StepStats, Usage
from manyhats.engine.residency.tiers import Tier
from manyhats.server.observability.live import LiveMetrics
from manyhats.server.observability.ports import HttpConnections, PortMetrics
from manyhats.server.observability.task_labels import TaskLabels, TaskVersions
from manyhats.server.observability.task_series import (
    CounterSeries,
    HistogramSeries,
    TaskCounter,
    TaskHistogram,
)

if TYPE_CHECKING:
    from manyhats.server.access.tls import ServerTls
    from manyhats.server.access.tokens import TokenFile
    from manyhats.server.service.backend import Backend

# Seconds. The first bounds suit a tiny model, the last a long queue.
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TURN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_COMPILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STEP_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_LENGTH_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_ADAPTER_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts events. ``step``, ``adapter_loaded`` and ``constraint_compiled`` may be called from any thread.

    Args:
        max_task_labels: how many tasks have their own series; the others count as ``_other``.
        clock: wall time, for series whose value is a time.
    """

    def __init__(self, *, max_task_labels: int, clock: Callable[[], float] = time.time) -> None:
        self.registry = CollectorRegistry()
        self._labels = TaskLabels(max_task_labels)
        self._versions = TaskVersions()
        self._requests = self._task_counter(
            "requests", "Calls, by task, RPC and status code.", "method", "code"
        )
        self._request_seconds = self._task_histogram(
            "request_seconds", "Generate, GenerateStream and Score, first to last byte.", _REQUEST_BUCKETS
        )
        self._first_token = self._task_histogram(
            "time_to_first_token_seconds", "From acceptance to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._task_histogram(
            "inter_token_seconds", "Between two tokens of one request.", _INTER_TOKEN_BUCKETS
        )
        self._queue = self._task_histogram(
            "queue_seconds", "From acceptance to the first step.", _QUEUE_BUCKETS
        )
        self._generations = self._task_counter(
            "generations", "Generations that ended well, by task and why they ended.", "finish_reason"
        )
        # Not by task: what memory and batches are sized by, and lengths by task are known on average.
        self._prompt_lengths = self._histogram(
            "request_prompt_tokens", "Prompt tokens of one request that began.", _LENGTH_BUCKETS
        )
        self._output_lengths = self._histogram(
            "request_generated_tokens", "Tokens of one generation that ended well.", _LENGTH_BUCKETS
        )
        self._prompt_tokens = self._task_counter("prompt_tokens", "Prompt tokens of requests that began.")
        self._generated_tokens = self._task_counter("generated_tokens", "Tokens generated.")
        self._draft_tokens = self._task_counter(
            "draft_tokens", "Tokens guessed and computed ahead, counted when the answer ends."
        )
        self._accepted_draft_tokens = self._task_counter(
            "accepted_draft_tokens", "Those of them that came; part of the tokens generated."
        )
        self._encoded_tokens = self._task_counter(
            "tokens_encoded", "Tokens of texts that were read, counted when the call ends."
        )
        self._of_tokens: dict[str, tuple[CounterSeries, HistogramSeries]] = {}  # label → series that exist
        self._turn_seconds = self._histogram(
            "event_loop_turn_seconds",
            "One turn of the event loop, which sends nothing else meanwhile.",
            _TURN_BUCKETS,
        )
        self._add_engine_metrics()
        self._add_adapter_metrics()
        self._live = LiveMetrics(self._versions, self._labels, clock)
        self._ports = PortMetrics()
        self.registry.register(self._live)
        self.registry.register(self._ports)
        ProcessCollector(registry=self.registry)

    def _add_engine_metrics(self) -> None:
        self._cache_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("preemptions", "Sequences whose KV blocks were taken back.")
        self._step_seconds = self._histogram("step_seconds", "One step of the engine.", _STEP_BUCKETS)
        self._step_tokens = self._histogram(
            "step_tokens", "Tokens of one step: of prompts, outputs and drafts.", _STEP_TOKEN_BUCKETS
        )
        self._compile_seconds = self._histogram(
            "constraint_compile_seconds",
            "Compiling one request's constraint, refused or not; those compiled before are not counted.",
            _COMPILE_BUCKETS,
        )
        self._batch_adapters = self._histogram(
            "batch_adapters", "Distinct adapters in one step, the base model not counted.", _ADAPTER_BUCKETS
        )

    def _add_adapter_metrics(self) -> None:
        self._load_seconds = self._histogram(
            "adapter_load_seconds",
            "Reading, checking and lowering one adapter for a tier.",
            _LOAD_BUCKETS,
            "tier",
        )
        self._registrations = self._counter(
            "adapter_registrations",
            "Registrations and uploads: created, existing, validated, refused or abandoned.",
            "result",
            "reason",
        )

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"manyhats_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"manyhats_{name}", help_text, labels, buckets=buckets, registry=self.registry)

    def _task_counter(self, name: str, help_text: str, *others: str) -> TaskCounter:
        counter = TaskCounter(f"manyhats_{name}", help_text, *others)
        self.registry.register(counter)
        return counter

    def _task_histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> TaskHistogram:
        histogram = TaskHistogram(f"manyhats_{name}", help_text, buckets)
        self.registry.register(histogram)
        return histogram

    def attach_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Let a gauge show whether a request would be served; asked in any thread."""
        self._live.is_ready = is_ready

    def attach(self, backend: Backend) -> None:
        """Let gauges show this backend's engine from now on."""
        self._live.backend = backend

    def attach_files(self, tls: ServerTls | None, tokens: TokenFile | None) -> None:
        """Let gauges show the state of these files from now on."""
        self._ports.tls, self._ports.tokens = tls, tokens

    def attach_http(self, http: HttpConnections) -> None:
        """Let gauges show this port's connections from now on."""
        self._ports.http = http

    def call_finished(self, method: str, task_id: str | None, code: str, seconds: float | None) -> None:
        """Count a call that ended; ``task_id`` is None for calls about no task, ``seconds`` is None if not measured."""
        label = "" if task_id is None else self._labels.label(task_id)
        self._requests.series(label, method, code).inc()
        if seconds is not None:
            self._request_seconds.series(label).observe(seconds)

    def output(self, task_id: str, output: StepOutput, *, since_s: float, is_first: bool) -> None:
        """Count a generation's output; ``since_s`` is when the previous one came, or when the request was accepted."""
        label, num_tokens, waited_s = self._labels.label(task_id), len(output.tokens), output.time_s - since_s
        generated, inter_token = self._of_tokens.get(label) or self._series_of_tokens(label)
        generated.inc(num_tokens)
        if output.finish_reason is not None:
            self._generations.series(label, output.finish_reason.value).inc()
            self._output_lengths.observe(output.usage.generated_tokens)
        if is_first:
            self._began(label, output.usage)
            self._first_token.series(label).observe(waited_s)
            return
        if num_tokens:
            inter_token.observe(waited_s / num_tokens, num_tokens)

    def _series_of_tokens(self, label: str) -> tuple[CounterSeries, HistogramSeries]:
        """What every token is counted in; found once, as it takes longer than counting."""
        series = self._generated_tokens.series(label), self._inter_token.series(label)
        self._of_tokens[label] = series
        return series

    def guessed(self, task_id: str, usage: Usage) -> None:
        """Count what was guessed of an answer that ended, however it did."""
        if usage.draft_tokens:
            label = self._labels.label(task_id)
            self._draft_tokens.series(label).inc(usage.draft_tokens)
            self._accepted_draft_tokens.series(label).inc(usage.accepted_draft_tokens)

    def scored(self, task_id: str, usage: Usage) -> None:
        """Count a scoring that ended."""
        self._began(self._labels.label(task_id), usage)

    def encoded(self, task_id: str, usage: Usage) -> None:
        """Count an encoding that ended."""
        self._began(self._labels.label(task_id), usage)
        self._encoded_tokens.series(self._labels.label(task_id)).inc(usage.prompt_tokens)

    def _began(self, label: str, usage: Usage) -> None:
        self._queue.series(label).observe(usage.queue_s)
        self._prompt_tokens.series(label).inc(usage.prompt_tokens)
        self._prompt_lengths.observe(usage.prompt_tokens)

    def step(self, stats: StepStats) -> None:
        """Count a step of the engine."""
        self._step_seconds.observe(stats.duration_s)
        self._step_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens + stats.num_draft_tokens)
        self._batch_adapters.observe(stats.num_adapters)
        self._preemptions.inc(stats.num_preempted)
        self._cache_queries.inc(stats.prefix_cache_queries)
        self._cache_hits.inc(stats.prefix_cache_hits)

    def turn(self, seconds: float) -> None:
        """Count a turn of the event loop."""
        self._turn_seconds.observe(seconds)

    def constraint_compiled(self, seconds: float) -> None:
        """Count the compilation of a constraint."""
        self._compile_seconds.observe(seconds)

    def adapter_loaded(self, seconds: float) -> None:
        """Count an adapter that was read from the store and lowered, to be kept in host memory."""
        self._load_seconds.labels(Tier.HOST.value).observe(seconds)

    def registration(self, result: str, reason: str = "") -> None:
        """Count a registration by ``result``, one of those in the metric's help, and the ``reason`` if refused."""
        self._registrations.labels(result, reason).inc()

    def task_changed(self, task_id: str, records: Sequence[AdapterRecord]) -> None:
        """Set a task's versions; without any, its series are removed."""
        self._versions.set(task_id, records)
        if records:
            self._labels.add(task_id)
            return
        self._labels.remove(task_id)
        for metric in (
            self._requests,
            self._generations,
            self._prompt_tokens,
            self._generated_tokens,
            self._draft_tokens,
            self._accepted_draft_tokens,
            self._encoded_tokens,
            self._request_seconds,
            self._first_token,
            self._inter_token,
            self._queue,
        ):
            metric.remove(task_id)
        self._of_tokens.pop(task_id, None)
