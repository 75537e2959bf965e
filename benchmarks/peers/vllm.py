"""vLLM's CPU build, through its own server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.environments import python_of
from benchmarks.measure import Measurement, Sample
from benchmarks.peers.answers import measure_answers, measure_peak, openai_ask
from benchmarks.peers.peer import (
    ANSWER_CASES,
    DISTINCT,
    ENVIRONMENTS,
    MEMORY_CASE,
    REQUIREMENTS,
    Bench,
    answers_case,
)
from benchmarks.peers.servers import Running, running
from benchmarks.workload import BASE_CASES, Adapter, Case

_BASE = "base"
_KV_GIB = 1
"""What manyhats' cache takes by default; vLLM takes a share of the machine's memory unless it is told."""


class VllmPeer:
    """A server of the base, then one that has LoRAs: room for them slows a base request down.

    Raises:
        UnavailableError: its packages cannot be installed.
    """

    name = "vllm"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._python = python_of(ENVIRONMENTS / self.name, REQUIREMENTS / f"{self.name}.txt")

    def visit(self, index: int) -> Iterator[Sample]:
        """See ``Peer``."""
        if "servers" not in self._bench.parts:
            return
        with self._serving(()) as server:
            for case in BASE_CASES:
                yield self._sample(answers_case(case), index, self._answers(server, case, index))
        for case in ANSWER_CASES:
            if case.num_adapters:
                with self._serving(sorted(case.adapters)) as server:
                    yield self._sample(answers_case(case), index, self._answers(server, case, index))
        if index == 0:
            with self._serving(sorted(DISTINCT.adapters)) as server:
                measured = measure_peak(self._bench, server.pid, openai_ask(server.address, _fields))
                yield self._sample(MEMORY_CASE, index, measured)

    def _answers(self, server: Running, case: Case, index: int) -> Measurement:
        return measure_answers(self._bench, case, 1000 * index, openai_ask(server.address, _fields))

    def _serving(self, adapters: Sequence[Adapter]) -> AbstractContextManager[Running]:
        settings, lengths = self._bench.workload.settings, self._bench.lengths
        options: list[object] = ["--served-model-name", _BASE, "--dtype", "bfloat16"]
        options += ["--max-num-seqs", max(case.num_sequences for case in ANSWER_CASES)]
        options += ["--max-model-len", max(lengths.memory_tokens, 2 * lengths.answer_tokens)]
        if adapters:
            options += ["--enable-lora", "--max-loras", len(adapters)]
            options += ["--max-cpu-loras", len(adapters), "--max-lora-rank", settings.adapter_rank]
            options += ["--lora-modules"]
            options += [f"{adapter.name}={self._bench.workload.adapters[adapter]}" for adapter in adapters]
        variables = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(ENVIRONMENTS / self.name / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
            # By itself it would leave one processor to its HTTP server, and so compute on one of two.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{settings.threads - 1}",
        }
        python, model = str(self._python), str(self._bench.workload.directory)

        def command(port: int) -> Sequence[str]:
            # Its program ``vllm`` asks for the version of a package of that name, which the CPU build is not.
            serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
            return [*serve, "--host", "127.0.0.1", "--port", str(port), *map(str, options)]

        return running(command, variables)

    def _sample(self, case: str, index: int, measurement: Measurement) -> Sample:
        return Sample(system=self.name, variant="", case=case, round=index, measurement=measurement)


def _fields(adapter: Adapter | None) -> Mapping[str, Any]:
    return {"model": _BASE if adapter is None else adapter.name}
