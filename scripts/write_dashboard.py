"""Writes deploy/grafana/manyhats.json, the dashboard, from the panels below.

With ``--check`` it writes nothing, shows how the file differs from what it would be, and exits 1 if it does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dashboard_queries import SERVERS, TASKS, gauge, mean, quantile, quantiles, total_rate
from generated_file import write_or_check
from grafana_panels import Panel, Query, Row, Variable, dashboard

FILE = Path(__file__).resolve().parents[1] / "deploy/grafana/manyhats.json"

VARIABLES = (
    Variable("datasource", "Data source", "prometheus", is_datasource=True),
    Variable("instance", "Server", "label_values(manyhats_build_info, instance)"),
    Variable("task", "Task", f"label_values(manyhats_requests_total{{{SERVERS}}}, task)"),
)
STACKED = {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 30}}


def latency(title: str, name: str, description: str) -> list[Panel]:
    """A histogram by task: of all tasks, and of the slowest."""
    slowest = f"topk(10, {quantile(0.95, name, TASKS, by='task')})"
    return [
        Panel(title=title, description=description, queries=quantiles(name, TASKS), unit="s", width=12),
        Panel(
            title=f"{title}: p95 of the ten slowest tasks",
            queries=[Query(slowest, "{{task}}")],
            unit="s",
            width=12,
        ),
    ]


OVERVIEW = Row(
    "Overview",
    (
        Panel(
            title="Ready",
            description="1 where a request would be served.",
            kind="stat",
            queries=[Query(f"manyhats_ready{{{SERVERS}}}", "{{instance}}")],
            width=4,
        ),
        Panel(
            title="What runs",
            kind="stat",
            queries=[
                Query(
                    f"sum by (version, base, quantization, device) (manyhats_build_info{{{SERVERS}}})",
                    "{{version}}: {{base}}, {{quantization}}, {{device}}",
                )
            ],
            description="Servers by version and base model.",
            width=8,
        ),
        Panel(
            title="Requests",
            description="Running: sequences that hold KV blocks. Waiting: for a step, an adapter or a constraint.",
            queries=[
                Query(gauge("requests_running"), "running"),
                Query(gauge("requests_waiting"), "waiting"),
            ],
            width=12,
        ),
        Panel(
            title="Tokens per second",
            queries=[
                Query(total_rate("generated_tokens_total", TASKS), "generated"),
                Query(total_rate("prompt_tokens_total", TASKS), "of prompts"),
            ],
        ),
        Panel(
            title="Calls per second by code",
            queries=[Query(total_rate("requests_total", TASKS, by="code"), "{{code}}")],
            unit="reqps",
            fields=STACKED,
        ),
        Panel(
            title="Errors per second by code and method",
            queries=[Query(total_rate("requests_total", f'{TASKS}, code!="OK"', by="code, method"))],
            unit="reqps",
        ),
        Panel(
            title="Why generations ended",
            queries=[Query(total_rate("generations_total", TASKS, by="finish_reason"), "{{finish_reason}}")],
            unit="reqps",
            fields=STACKED,
        ),
        Panel(title="Length of prompts, in tokens", queries=quantiles("request_prompt_tokens")),
        Panel(title="Length of generations, in tokens", queries=quantiles("request_generated_tokens")),
    ),
)
LATENCY = Row(
    "Latency",
    (
        *latency("First token", "time_to_first_token_seconds", "From acceptance to the first token."),
        *latency("Between tokens", "inter_token_seconds", "Between two tokens of one request."),
        *latency(
            "Queue", "queue_seconds", "From acceptance to the first step, with any load of the adapter."
        ),
        *latency("Whole call", "request_seconds", "First to last byte of calls that run a model."),
    ),
)
TASK_ROW = Row(
    "Tasks",
    (
        Panel(
            title="Tokens per second, the twenty busiest tasks",
            kind="bargauge",
            queries=[
                Query(f"topk(20, {total_rate('generated_tokens_total', TASKS, by='task')})", "{{task}}", True)
            ],
            height=16,
        ),
        Panel(
            title="First token, all selected tasks",
            kind="heatmap",
            description="How many first tokens took how long.",
            queries=[
                Query(
                    "sum by (le) (increase("
                    f"manyhats_time_to_first_token_seconds_bucket{{{TASKS}}}[$__rate_interval]))",
                    "{{le}}",
                )
            ],
            width=16,
        ),
        Panel(
            title="Versions in the store by state",
            description="The largest count of any server: servers of one store count the same versions.",
            queries=[Query(gauge("adapters", "state", how="max"), "{{state}}")],
        ),
        Panel(
            title="Registrations by result",
            queries=[
                Query(
                    "sum by (result, reason) (increase("
                    f"manyhats_adapter_registrations_total{{{SERVERS}}}[$__rate_interval]))",
                    "{{result}} {{reason}}",
                )
            ],
        ),
    ),
)
ADAPTERS = Row(
    "Adapters",
    (
        Panel(
            title="Versions in memory by tier",
            description="device: they have a slot, too.",
            queries=[Query(gauge("adapter_resident", "tier"), "{{tier}}")],
            fields=STACKED,
        ),
        Panel(
            title="Evictions per second by tier",
            queries=[Query(total_rate("adapter_evictions_total", by="tier"), "{{tier}}")],
        ),
        Panel(
            title="Loading one adapter",
            description="Reading, checking and lowering.",
            queries=quantiles("adapter_load_seconds"),
            unit="s",
        ),
        Panel(
            title="Distinct adapters in a step",
            queries=[Query(mean("batch_adapters"), "mean"), *quantiles("batch_adapters")[1:]],
        ),
        Panel(
            title="Servers that have a task's versions in memory",
            kind="bargauge",
            queries=[
                Query(
                    f"topk(20, count by (task) (manyhats_adapter_resident{{{TASKS}}} > 0))", "{{task}}", True
                )
            ],
        ),
        Panel(
            title="Loads per second",
            queries=[Query(total_rate("adapter_load_seconds_count", by="instance"), "{{instance}}")],
        ),
    ),
)
ENGINE = Row(
    "Engine",
    (
        Panel(title="One step", queries=quantiles("step_seconds"), unit="s"),
        Panel(
            title="Tokens of a step",
            description="Of prompts, outputs and drafts.",
            queries=[Query(mean("step_tokens"), "mean"), *quantiles("step_tokens")[1:]],
        ),
        Panel(
            title="KV blocks by state",
            queries=[Query(gauge("kv_blocks", "state"), "{{state}}")],
            fields=STACKED,
        ),
        Panel(
            title="KV cache in use",
            queries=[Query(f"manyhats_kv_cache_usage_ratio{{{SERVERS}}}", "{{instance}}")],
            unit="percentunit",
            fields={"max": 1},
        ),
        Panel(
            title="Preemptions per second", queries=[Query(total_rate("preemptions_total"), "preemptions")]
        ),
        Panel(
            title="Prompt tokens found in the prefix cache",
            queries=[
                Query(
                    f"{total_rate('prefix_cache_hits_total')} / {total_rate('prefix_cache_queries_total')}",
                    "found",
                )
            ],
            unit="percentunit",
            fields={"max": 1},
        ),
        Panel(
            title="Memory",
            description="The base model by part, pinned adapters, and each process as a whole.",
            queries=[
                Query(gauge("model_bytes", "part", how="max"), "{{part}}"),
                Query(gauge("adapter_pinned_bytes", how="max"), "pinned adapters"),
                Query(gauge("adapter_device_bytes", "state", how="max"), "adapters on the GPU, {{state}}"),
                Query(f"process_resident_memory_bytes{{{SERVERS}}}", "{{instance}}"),
            ],
            unit="bytes",
        ),
        Panel(
            title="Since the engine last turned",
            queries=[
                Query(
                    f"time() - manyhats_engine_heartbeat_timestamp_seconds{{{SERVERS}}}",
                    "{{instance}}",
                )
            ],
            unit="s",
        ),
        Panel(
            title="Event loop and constraints",
            description="While the event loop turns, nothing is sent. Constraints are compiled before they queue.",
            queries=[
                Query(quantile(0.99, "event_loop_turn_seconds"), "p99 of a turn"),
                Query(quantile(0.95, "constraint_compile_seconds"), "p95 of compiling"),
            ],
            unit="s",
        ),
    ),
)
AROUND = Row(
    "Store, ports and files",
    (
        Panel(
            title="Store usable",
            queries=[Query(gauge("store_usable", "use", how="min"), "{{use}}")],
            fields={"max": 1},
        ),
        Panel(
            title="Behind other servers' changes",
            description="Since the catalogue was last read.",
            queries=[
                Query(
                    f'time() - manyhats_store_last_success_timestamp_seconds{{{SERVERS}, use="catalogue"}}',
                    "{{instance}}",
                )
            ],
            unit="s",
        ),
        Panel(
            title="Looks at the store that failed, per second",
            queries=[Query(total_rate("store_failures_total", by="use"), "{{use}}")],
        ),
        Panel(
            title="HTTP port",
            queries=[
                Query(gauge("http_requests_in_flight"), "requests in flight"),
                Query(gauge("http_connections"), "connections"),
                Query(total_rate("http_connections_refused_total"), "refused per second"),
            ],
        ),
        Panel(
            title="Certificates expire in",
            kind="stat",
            queries=[
                Query(
                    f"min by (file) (manyhats_tls_not_after_timestamp_seconds{{{SERVERS}}}) - time()",
                    "{{file}}",
                )
            ],
            unit="s",
        ),
        Panel(
            title="Files that cannot be used as they are",
            kind="stat",
            queries=[Query(gauge("files_unreadable", "files", how="max"), "{{files}}")],
        ),
    ),
)


def described() -> str:
    """The dashboard's JSON."""
    rows = (OVERVIEW, LATENCY, TASK_ROW, ADAPTERS, ENGINE, AROUND)
    return dashboard("manyhats", "manyhats", VARIABLES, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check; returns the exit code."""
    return write_or_check(FILE, described(), "write_dashboard.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
