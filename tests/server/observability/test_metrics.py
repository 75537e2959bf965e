"""What ``/metrics`` says: names, labels, values, and that it never waits for the engine."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from manyhats.adapters.artifact import AdapterState
from manyhats.adapters.errors import AdapterUnsafeError, StoreUnavailableError
from manyhats.engine.output import StepStats
from manyhats.server.http.metrics_port import MetricsPort
from manyhats.server.http.probes import make_metrics_app
from manyhats.server.observability import gateway
from manyhats.server.observability.task_labels import TaskLabels
from manyhats.server.service.store_health import StoreHealth, StoreUse
from manyhats.v1 import adapter_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, eventually, make_backend, make_record, refused, running_server

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def _get(address: str, accept: str) -> tuple[str, str]:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


async def scrape(server: Running) -> Series:
    """Every sample by its name and labels; fails on a sample that is there twice."""
    _, text = await asyncio.to_thread(_get, server.http, "text/plain")
    series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in series, f"twice: {key}"
            series[key] = sample.value
    return series


def value(series: Series, name: str, **labels: str) -> float:
    return series[(name, frozenset(labels.items()))]


def labels_of(series: Series, name: str) -> list[dict[str, str]]:
    return [dict(labels) for each, labels in series if each == name]


async def test_every_name_of_the_api_is_there_after_one_request() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a"))
        await server.generation.Generate(pb.GenerateRequest(task_id="hats", text="abc"))
        server.metrics.adapter_loaded(0.1)
        series = await scrape(server)
        names = {name for name, _ in series}
    assert names >= {
        "manyhats_requests_total",
        "manyhats_request_seconds_count",
        "manyhats_time_to_first_token_seconds_count",
        "manyhats_inter_token_seconds_count",
        "manyhats_queue_seconds_count",
        "manyhats_prompt_tokens_total",
        "manyhats_generated_tokens_total",
        "manyhats_requests_running",
        "manyhats_requests_waiting",
        "manyhats_kv_cache_usage_ratio",
        "manyhats_kv_blocks",
        "manyhats_prefix_cache_queries_total",
        "manyhats_prefix_cache_hits_total",
        "manyhats_preemptions_total",
        "manyhats_step_seconds_count",
        "manyhats_step_tokens_count",
        "manyhats_batch_adapters_count",
        "manyhats_constraint_compile_seconds_count",
        "manyhats_adapters",
        "manyhats_adapter_resident",
        "manyhats_adapter_load_seconds_count",
        "manyhats_adapter_evictions_total",
        "manyhats_adapter_registrations_total",
        "manyhats_model_bytes",
        "manyhats_engine_heartbeat_timestamp_seconds",
        "manyhats_build_info",
        "manyhats_generations_total",
        "manyhats_request_prompt_tokens_count",
        "manyhats_request_generated_tokens_count",
        "manyhats_store_last_success_timestamp_seconds",
        "manyhats_store_failures_total",
        "manyhats_http_requests_in_flight",
        "manyhats_http_connections_refused_total",
        "vllm:lora_requests_info",
    }
    assert {name for name in names if ":" in name} == set(gateway.NAMES)
    assert value(series, "manyhats_adapter_load_seconds_sum", tier="host") == 0.1


async def test_requests_and_tokens_count_by_task_method_and_code() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a"))
        await server.generation.Generate(pb.GenerateRequest(text="abc"))
        await server.generation.Generate(pb.GenerateRequest(task_id="hats@1", text="ab"))
        async for _ in server.generation.GenerateStream(pb.GenerateRequest(task_id="hats", text="ab")):
            pass
        await server.generation.Score(pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b")]))
        await refused(server.generation.Generate(pb.GenerateRequest(task_id="unknown", text="ab")))
        await refused(server.generation.Generate(pb.GenerateRequest(text="")))
        series = await scrape(server)

    def requests(task: str, method: str, code: str) -> float:
        return value(series, "manyhats_requests_total", task=task, method=method, code=code)

    assert requests("_base", "Generate", "OK") == 1
    assert requests("hats", "Generate", "OK") == 1
    assert requests("hats", "GenerateStream", "OK") == 1
    assert requests("_base", "Score", "OK") == 1
    assert requests("_other", "Generate", "NOT_FOUND") == 1
    assert requests("_base", "Generate", "INVALID_ARGUMENT") == 1
    assert requests("hats", "RegisterAdapter", "OK") == 1
    assert value(series, "manyhats_request_seconds_count", task="hats") == 2
    assert value(series, "manyhats_prompt_tokens_total", task="hats") == 6
    assert value(series, "manyhats_generated_tokens_total", task="hats") == 6
    assert value(series, "manyhats_generated_tokens_total", task="_base") == 4
    assert value(series, "manyhats_time_to_first_token_seconds_count", task="hats") == 2
    assert value(series, "manyhats_inter_token_seconds_count", task="hats") == 4
    assert value(series, "manyhats_queue_seconds_sum", task="hats") == pytest.approx(0.002)


async def test_generations_count_by_task_and_why_they_ended_and_by_length() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a"))
        await server.generation.Generate(pb.GenerateRequest(text="abc"))
        request = pb.GenerateRequest(task_id="hats", text="ab", num_sequences=2)
        request.stopping.max_new_tokens = 1
        await server.generation.Generate(request)
        series = await scrape(server)
    name = "manyhats_generations_total"
    assert sum(count for (each, _), count in series.items() if each == name) == 3
    assert value(series, name, task="hats", finish_reason="length") == 2
    assert value(series, "manyhats_request_generated_tokens_count") == 3
    assert value(series, "manyhats_request_generated_tokens_bucket", le="1.0") == 2
    prompts = [value(series, f"manyhats_request_prompt_tokens_{each}") for each in ("count", "sum")]
    assert prompts[0] == 2
    assert prompts[1] == sum(
        value(series, "manyhats_prompt_tokens_total", task=task) for task in ("_base", "hats")
    )


async def test_what_runs_is_told_by_build_info() -> None:
    async with running_server() as server:
        series = await scrape(server)
    (labels,) = labels_of(series, "manyhats_build_info")
    version = labels.pop("version")
    assert version.startswith("0.")
    assert labels == {"base": "echo", "quantization": "nf4", "device": "cpu"}


async def test_whether_requests_are_served_shows() -> None:
    async with running_server(is_open=False) as server:
        loading = await scrape(server)
        server.gate.open(make_backend(server.engine, server.store))
        ready = await scrape(server)
        server.gate.drain()
        draining = await scrape(server)
    assert [value(each, "manyhats_ready") for each in (loading, ready, draining)] == [0, 1, 0]


async def test_looks_at_the_store_are_counted_and_dated() -> None:
    now_s = [1000.0]
    health = StoreHealth(clock=lambda: now_s[0])
    now_s[0] = 1005.0
    health.works(StoreUse.CATALOGUE)
    for _ in range(2):
        health.lost(StoreUse.READ, StoreUnavailableError("store", "is away"))
    health.hangs(StoreUse.WRITE)
    health.lost(StoreUse.WRITE, StoreUnavailableError("store", "is away"))  # what the same look ended with
    async with running_server() as server:
        server.metrics.attach(replace(server.gate.backend, store_health=health))
        series = await scrape(server)
    when, failures = "manyhats_store_last_success_timestamp_seconds", "manyhats_store_failures_total"
    uses = ("catalogue", "read", "write")
    assert [value(series, when, use=use) for use in uses] == [1005, 1000, 1000]
    assert [value(series, failures, use=use) for use in uses] == [0, 2, 1]


async def test_cancelled_and_late_calls_count_as_such() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.05
        call = server.generation.GenerateStream(pb.GenerateRequest(text="abcdefgh"))
        await call.read()
        call.cancel()
        with pytest.raises(Exception, match="DEADLINE"):
            await server.generation.Generate(pb.GenerateRequest(text="abcdefgh"), timeout=0.1)
        await eventually(lambda: server.gate.num_running == 0)
        series = await scrape(server)
    name = "manyhats_requests_total"
    assert value(series, name, task="_base", method="GenerateStream", code="CANCELLED") == 1
    assert value(series, name, task="_base", method="Generate", code="DEADLINE_EXCEEDED") == 1


async def test_gauges_show_the_engines_snapshot() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a"))
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="b"))
        server.engine.running, server.engine.heartbeat_s = 5, 1234.5
        series = await scrape(server)
        server.engine.without_slot.add("sha256:a")
        one_is_without = await scrape(server)
    assert value(series, "manyhats_requests_running") == 5
    assert value(series, "manyhats_requests_waiting") == 2
    assert value(series, "manyhats_kv_cache_usage_ratio") == 0.3
    blocks = {state: value(series, "manyhats_kv_blocks", state=state) for state in ("used", "cached", "free")}
    assert blocks == {"used": 3, "cached": 4, "free": 3}
    assert value(series, "manyhats_model_bytes", part="base") == 1000
    assert value(series, "manyhats_engine_heartbeat_timestamp_seconds") == 1234.5
    assert value(series, "manyhats_adapters", state="active") == 1
    assert value(series, "manyhats_adapters", state="inactive") == 1
    assert value(series, "manyhats_adapters", state="failed") == 0
    assert value(series, "manyhats_adapter_resident", task="hats", tier="device") == 2
    tiers = ("device", "host")
    residents = [value(one_is_without, "manyhats_adapter_resident", task="hats", tier=tier) for tier in tiers]
    assert residents == [1, 1]
    assert value(series, "manyhats_adapter_evictions_total", tier="device") == 7
    assert value(series, "manyhats_adapter_evictions_total", tier="host") == 5


async def test_a_device_s_own_memory_for_adapters_is_shown_where_there_is_one() -> None:
    async with running_server() as server:
        series = await scrape(server)
        server.engine.device = None
        without = await scrape(server)
    states = {
        state: value(series, "manyhats_adapter_device_bytes", state=state) for state in ("used", "free")
    }
    assert states == {"used": 70, "free": 30}
    assert value(series, "manyhats_adapter_copied_bytes_total") == 200
    assert not [name for name, _ in without if "device_bytes" in name or "copied_bytes" in name]


async def test_steps_feed_counters_and_histograms() -> None:
    async with running_server() as server:
        server.metrics.step(StepStats(0.02, 30, 2, 1, 3, 1, 30, 16))
        server.metrics.step(StepStats(0.01, 0, 2, 0, 0, 0, 0, 0))
        server.metrics.constraint_compiled(0.02)
        series = await scrape(server)
    assert value(series, "manyhats_constraint_compile_seconds_bucket", le="0.025") == 1
    assert value(series, "manyhats_step_seconds_count") == 2
    assert value(series, "manyhats_step_tokens_sum") == 35
    assert value(series, "manyhats_batch_adapters_bucket", le="0.0") == 1
    assert value(series, "manyhats_preemptions_total") == 1
    assert value(series, "manyhats_prefix_cache_queries_total") == 30
    assert value(series, "manyhats_prefix_cache_hits_total") == 16


async def test_registrations_count_by_result_and_reason() -> None:
    async with running_server() as server:
        server.store.errors["bad"] = AdapterUnsafeError("x.bin", "is a pickle")
        for uri, only in (("a", True), ("a", False), ("a", False)):
            request = adapter_pb2.RegisterAdapterRequest(task_id="hats", uri=uri, validate_only=only)
            await server.adapters.RegisterAdapter(request)
        bad = adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="bad")
        await refused(server.adapters.RegisterAdapter(bad))
        series = await scrape(server)
    name = "manyhats_adapter_registrations_total"
    for result, reason in (
        ("validated", ""),
        ("created", ""),
        ("existing", ""),
        ("refused", "ADAPTER_UNSAFE"),
    ):
        assert value(series, name, result=result, reason=reason) == 1


async def test_series_of_a_task_leave_with_it() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a"))
        server.engine.step_s = 0.02
        call = server.generation.GenerateStream(pb.GenerateRequest(task_id="hats", text="abcdef"))
        pieces = aiter(call)
        await anext(pieces)
        before = await scrape(server)
        await server.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(task_id="hats"))
        rest = [piece async for piece in pieces]
        series = await scrape(server)
    assert any(("task", "hats") in labels for _, labels in before)
    assert len(rest) == 6
    # What its requests still do after the deletion counts as another task's.
    assert not any(("task", "hats") in labels for _, labels in series)
    assert value(series, "manyhats_requests_total", task="_other", method="GenerateStream", code="OK") == 1


async def test_deleting_one_version_keeps_the_tasks_series() -> None:
    async with running_server() as server:
        for uri in ("a", "b"):
            await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri=uri))
        await server.generation.Generate(pb.GenerateRequest(task_id="hats", text="a"))
        await server.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(task_id="hats@1"))
        series = await scrape(server)
    assert value(series, "manyhats_requests_total", task="hats", method="Generate", code="OK") == 1


async def test_tasks_beyond_the_cap_share_one_label() -> None:
    async with running_server(max_task_labels=2) as server:
        for task_id in ("a", "b", "c", "d"):
            await server.adapters.RegisterAdapter(
                adapter_pb2.RegisterAdapterRequest(task_id=task_id, uri=task_id)
            )
            await server.generation.Generate(pb.GenerateRequest(task_id=task_id, text="x"))
        series = await scrape(server)
    tasks = {labels["task"] for labels in labels_of(series, "manyhats_generated_tokens_total")}
    assert tasks == {"a", "b", "_other"}
    assert value(series, "manyhats_generated_tokens_total", task="_other") == 4
    assert value(series, "manyhats_adapter_resident", task="_other", tier="device") == 2


def test_a_deleted_tasks_place_is_free_for_another() -> None:
    labels = TaskLabels(1)
    for task_id in ("a", "b"):
        labels.add(task_id)
    assert [labels.label(each) for each in ("", "a", "b", "never")] == ["_base", "a", "_other", "_other"]
    labels.remove("a")
    assert [labels.label(each) for each in ("a", "b")] == ["_other", "b"]


async def test_both_formats_are_served_by_the_accept_header() -> None:
    async with running_server() as server:
        await server.generation.Generate(pb.GenerateRequest(text="x"))
        plain, text = await asyncio.to_thread(_get, server.http, "text/plain")
        wanted = "application/openmetrics-text; version=1.0.0"
        open_type, open_text = await asyncio.to_thread(_get, server.http, wanted)
    assert plain.startswith("text/plain")
    assert list(parser.text_string_to_metric_families(text))
    assert open_type.startswith("application/openmetrics-text")
    assert open_text.endswith("# EOF\n")
    families = openmetrics_parser.text_string_to_metric_families(open_text)  # type: ignore[no-untyped-call]
    names = {family.name for family in families}
    assert {"manyhats_requests", "vllm:lora_requests_info"} <= names


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("version", ["x", "1.x", ".", "1..0", "-", "1,0", "\u00b2", "9" * 5000, "", "=", "0"])
async def test_a_format_that_cannot_be_read_is_answered_in_plain_text(kind: str, version: str) -> None:
    async with running_server() as server:
        found, text = await asyncio.to_thread(
            _get, server.http, f"{kind}; version={version}; q=zz; escaping=\xff"
        )
    is_latest = kind == "application/openmetrics-text" and version == ""
    assert found.startswith(kind if is_latest else "text/plain")
    assert "# TYPE manyhats_requests" in text


async def test_the_metrics_port_answers_while_the_event_loop_is_busy() -> None:
    async with running_server() as server:
        port = MetricsPort(make_metrics_app(server.gate, server.metrics.registry), host="127.0.0.1", port=0)
        port.start()
        try:
            # Called on the loop's own thread: were the port on the loop, this would never return.
            content_type, text = _get(port.address, "text/plain")
        finally:
            port.stop()
    assert "manyhats_requests_running" in text
    assert content_type.startswith("text/plain")


async def test_any_series_can_be_asked_for_alone() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="a"))
        registry = server.metrics.registry
        names = {sample.name for metric in registry.collect() for sample in metric.samples}
        names = {name for name in names if not name.startswith("process_")}
        assert "manyhats_requests_running" in names
        for name in names:
            (metric,) = registry.restricted_registry([name]).collect()
            assert {sample.name for sample in metric.samples} == {name}


async def test_catalogue_counts_follow_what_the_store_had_before_the_start() -> None:
    async with running_server() as server:
        records = [make_record("old", 1, state=AdapterState.INACTIVE), make_record("old", 2, "b")]
        server.metrics.task_changed("old", records)
        before = await scrape(server)
        server.metrics.task_changed("old", [])
        after = await scrape(server)
    assert value(before, "manyhats_adapters", state="inactive") == 1
    assert value(after, "manyhats_adapters", state="inactive") == 0
