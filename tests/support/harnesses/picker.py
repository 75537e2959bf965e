"""What the endpoint picker of Kubernetes' inference gateway knows of a replica, and how it scores it."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import parser


@dataclass(frozen=True)
class Endpoint:
    """A replica, as the picker knows it after a scrape."""

    base: str
    num_running: float
    num_waiting: float
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int
    running: frozenset[str]
    waiting: frozenset[str]

    def affinity(self, model: str) -> float:
        """The score of the picker's ``lora-affinity-scorer``."""
        if model in self.running:
            return 1.0
        if len(self.running) + len(self.waiting) < self.max_adapters:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


def read_endpoint(text: str) -> Endpoint:
    """A replica, from what it has at ``/metrics``."""
    samples = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert sample.name not in samples, "the picker takes any one of several series"
                samples[sample.name] = sample
    adapters = samples["vllm:lora_requests_info"].labels
    config = samples.get("vllm:cache_config_info")
    gauges = [
        samples.get(f"vllm:{name}")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ]
    bases = {each.labels["model_name"] for each in [*gauges, config] if each is not None}
    assert len(bases) <= 1
    return Endpoint(
        next(iter(bases), ""),
        *(-1.0 if each is None else each.value for each in gauges),
        int(config.labels["block_size"]) if config else 0,
        int(config.labels["num_gpu_blocks"]) if config else 0,
        int(adapters["max_lora"]),
        *(
            frozenset(name.strip() for name in adapters[f"{state}_lora_adapters"].split(",") if name)
            for state in ("running", "waiting")
        ),
    )
