"""What a scrape costs, and that metrics by task are what prometheus_client's own would be."""

from __future__ import annotations

import gzip
import random
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, parser
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import parser as openmetrics_parser

from manyhats.engine.output import FinishReason, StepOutput, TokenOutput, Usage
from manyhats.server.http.probes import Scrape
from manyhats.server.observability.exposition import exposition
from manyhats.server.observability.metrics import Metrics
from manyhats.server.observability.task_series import TaskCounter, TaskHistogram
from support.fakes.server import EchoEngine, MemoryStore, make_backend, make_record

OPEN_METRICS = "application/openmetrics-text;version=1.0.0"
BOUNDS = (0.005, 0.25, 1, 2.5, 1000)


@pytest.mark.parametrize("accept", ["text/plain", OPEN_METRICS])
def test_a_histogram_by_task_reads_as_the_librarys(accept: str) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    library, own = CollectorRegistry(), CollectorRegistry()
    reference = Histogram("x_seconds", "Some seconds.", ["task"], buckets=BOUNDS, registry=library)
    histogram = TaskHistogram("x_seconds", "Some seconds.", BOUNDS)
    own.register(histogram)
    rng = random.Random(7)
    for _ in range(300):
        task, times = rng.choice(("sql", "_base", "a.b-c")), rng.randint(1, 3)
        amount = rng.choice((rng.lognormvariate(0, 3), 0.25, 0.0, 1.0))
        histogram.series(task).observe(amount, times)
        for _ in range(times):
            reference.labels(task).observe(amount)
    check_same(own, library, accept)


@pytest.mark.parametrize("accept", ["text/plain", OPEN_METRICS])
def test_a_counter_by_task_reads_as_the_librarys(accept: str) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    library, own = CollectorRegistry(), CollectorRegistry()
    reference = Counter("x", "Some things.", ["task", "why"], registry=library)
    counter = TaskCounter("x", "Some things.", "why")
    own.register(counter)
    rng = random.Random(7)
    for _ in range(100):
        values, amount = (rng.choice(("sql", "_base", "a.b-c")), rng.choice(("a", ""))), rng.randint(0, 9)
        counter.series(*values).inc(amount)
        reference.labels(*values).inc(amount)
    check_same(own, library, accept)
    counter.remove("sql")
    reference.remove_by_labels({"task": "sql"})
    check_same(own, library, accept)
    (metric,) = own.restricted_registry(["x_total"]).collect()
    assert len(metric.samples) == 4


def check_same(own: CollectorRegistry, library: CollectorRegistry, accept: str) -> None:
    """What is read of the two is the same, name by name, type by type."""
    is_open = accept == OPEN_METRICS
    read = (openmetrics_parser if is_open else parser).text_string_to_metric_families

    def families(text: bytes) -> dict[tuple[str, str, str], dict[Any, float]]:
        return {
            (family.name, family.type, family.documentation): {
                (each.name, tuple(sorted(each.labels.items()))): each.value for each in family.samples
            }
            for family in read(text.decode())
        }

    encode, wanted_type = choose_encoder(accept)
    content_type, text = exposition(own, accept)
    wanted = families(encode(library))
    found = families(text)
    assert content_type == wanted_type
    assert found.keys() == wanted.keys()
    assert all(found[key] == pytest.approx(wanted[key]) for key in wanted)
    assert families(encode(own)) == found


def crowded() -> Metrics:
    """1,000 tasks, of which 100 are in memory and have answered."""
    metrics = Metrics(max_task_labels=256)
    engine = EchoEngine()
    for index in range(1000):
        record = make_record(f"task-{index:04}", 1, f"{index}")
        metrics.task_changed(record.task_id, [record])
        if index < 100:
            engine.resident[record.digest] = record
            _answer(metrics, record.task_id, random.Random(index))
    metrics.attach(make_backend(engine, MemoryStore()))
    return metrics


def _answer(metrics: Metrics, task_id: str, rng: random.Random) -> None:
    token, ends = (TokenOutput(1, "x"),), [None, *FinishReason]
    for _ in range(100):
        metrics.call_finished("GenerateStream", task_id, "OK", rng.lognormvariate(0, 1))
        usage = Usage(prompt_tokens=10, queue_s=rng.lognormvariate(-5, 1))
        for is_first, waited_s in ((True, rng.lognormvariate(-3, 1)), (False, rng.lognormvariate(-4, 1))):
            output = StepOutput("", token, (), rng.choice(ends), usage, 1.0)
            metrics.output(task_id, output, since_s=1 - waited_s, is_first=is_first)


def test_a_scrape_with_a_thousand_tasks_of_which_a_hundred_are_hot_is_small_and_quick() -> None:
    metrics = crowded()
    # What Prometheus asks for.
    scrape = Scrape(f"{OPEN_METRICS},text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "gzip")
    seconds = []
    for _ in range(10):
        began_s = time.thread_time()
        _, body = scrape.answer(metrics.registry)
        seconds.append(time.thread_time() - began_s)
    text = gzip.decompress(body).decode()
    assert text.count('_bucket{le="+Inf",task="task-') == 400
    assert len(body) <= 64_000
    assert min(seconds) <= 0.02, f"{min(seconds):.4f} s; other processes do not count"
