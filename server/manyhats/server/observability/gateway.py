"""What Kubernetes' inference gateway reads of a replica to route to it, by vLLM's names.

Its endpoint picker takes pods without a label of their own for vLLM's. It splits the lists of adapters at commas, and
compares each name with the model that a request asks for.

Source: the Model Server Protocol of the Gateway API Inference Extension (gateway-api-inference-extension.sigs.k8s.io).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import Metric

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.server.observability.gauges import gauge

if TYPE_CHECKING:
    from manyhats.server.service.backend import Backend

NAMES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
)


def load_gauges(backend: Backend) -> Iterator[Metric]:
    """How busy the replica is. The share of KV blocks in use is from 0 to 1, whatever its name says."""
    stats, base = backend.engine.stats, backend.info.name
    share = stats.kv_blocks_used / max(stats.kv_blocks_total, 1)
    for name, help_text, value in (
        ("vllm:num_requests_running", "manyhats_requests_running.", stats.num_running),
        ("vllm:num_requests_waiting", "manyhats_requests_waiting.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "manyhats_kv_cache_usage_ratio.", share),
    ):
        yield gauge(name, f"For inference gateways: {help_text}", ["model_name"], [((base,), value)])
    config = (str(stats.kv_block_size), str(stats.kv_blocks_total), base)
    labels = ["block_size", "num_gpu_blocks", "model_name"]
    yield gauge("vllm:cache_config_info", "For inference gateways: KV blocks.", labels, [(config, 1)])


def adapter_gauge(
    max_adapters: int,
    running: Iterable[AdapterRecord],
    waiting: Iterable[str],
    records: Iterable[AdapterRecord],
    now_s: float,
) -> Metric:
    """Which adapters the replica can run at once, and which requests wait for.

    A version goes by the name that leads requests to it: an active one by its task's, any other by ``task@3``. So a
    replica that has an inactive version alone is not taken to have the task.

    Args:
        max_adapters: how many run at once; 0 while the base loads.
        running: versions that are ready to run.
        waiting: names of versions that are waited for.
        records: all versions.
        now_s: wall time; of several such series, the latest counts.
    """
    active = {record.name: record.task_id for record in records if record.state is AdapterState.ACTIVE}
    lists = ({record.name for record in running}, set(waiting))
    names = [",".join(sorted({active.get(name, name) for name in each})) for each in lists]
    labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    values = [((str(max_adapters), *names), now_s)]
    return gauge("vllm:lora_requests_info", "Adapters loaded and waited for.", labels, values)
