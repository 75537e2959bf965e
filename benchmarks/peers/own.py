"""manyhats itself: the engine in a process of its own, then the server through gRPC and through HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.engine import EngineSession
from benchmarks.measure import Measurement, Sample
from benchmarks.peers.answers import Ask, measure_answers, measure_peak, openai_ask
from benchmarks.peers.beside import busy_process
from benchmarks.peers.peer import (
    ANSWER_CASES,
    BUSY_CASES,
    DISTINCT,
    MEMORY_CASE,
    PROMPT_CASES,
    Bench,
    answers_case,
    busy_case,
    context_case,
)
from benchmarks.process import serving
from benchmarks.worker import Worker
from benchmarks.workload import Adapter, Case
from manyhats.client import Client

_SEEDS = 1000
"""Of a round; no two prompts of a round begin alike, or the prefix cache would have them."""
_HTTP, _CONTEXT, _BUSY = 200, 400, 600
"""Among a round's seeds, the first of each subject's."""


class OwnPeer:
    """What the others are compared with."""

    name = "manyhats"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def visit(self, index: int) -> Iterator[Sample]:
        """See ``Peer``."""
        if "process" in self._bench.parts:
            with Worker(EngineSession, self._bench.workload) as engine:
                for name, measured in self._in_process(engine, _SEEDS * index):
                    yield _sample("engine", name, index, measured)
        if "servers" in self._bench.parts:
            yield from self._served(index)

    def _served(self, index: int) -> Iterator[Sample]:
        first = _SEEDS * index
        with serving(self._bench.workload) as server, Client(server.grpc) as client:
            for adapter in sorted(DISTINCT.adapters):
                client.register_adapter(adapter.name, str(self._bench.workload.adapters[adapter]))
            grpc, http = grpc_ask(client), http_ask(client, server.http)
            for case in (*ANSWER_CASES, DISTINCT):
                measured = measure_answers(self._bench, case, first, grpc)
                yield _sample("grpc", answers_case(case), index, measured)
                measured = measure_answers(self._bench, case, first + _HTTP, http)
                yield _sample("http", answers_case(case), index, measured)
            if index == 0:
                peak = measure_peak(self._bench, server.pid, grpc)
                yield _sample("grpc", MEMORY_CASE, index, peak)

    def _in_process(self, engine: Worker, first: int) -> Iterator[tuple[str, Measurement]]:
        for case in (*PROMPT_CASES, DISTINCT):
            yield case.name, engine.call("measure", case, first)
        for number, num_tokens in enumerate(self._bench.lengths.contexts):
            seed = first + _CONTEXT + number
            yield context_case(num_tokens), engine.call("measure", Case(1), seed, num_tokens)
        for case in BUSY_CASES:
            with busy_process():
                engine.call("measure", case, first + _BUSY)  # as every peer beside it: the second run counts
                yield busy_case(case), engine.call("measure", case, first + _BUSY + 1)


def grpc_ask(client: Client) -> Ask:
    """Asks for whole answers by ``Generate``."""

    def ask(prompt: Sequence[int], adapter: Adapter | None, num_tokens: int) -> int:
        task_id = "" if adapter is None else adapter.name
        answer = client.generate(
            list(prompt), task_id=task_id, max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True
        )
        return len(answer.tokens)

    return ask


def http_ask(client: Client, address: str) -> Ask:
    """Asks for whole answers by OpenAI's API; ``client`` knows the base's name."""
    base = client.server_info().base_model

    def fields(adapter: Adapter | None) -> Mapping[str, Any]:
        return {"model": base if adapter is None else adapter.name}

    return openai_ask(address, fields)


def _sample(system: str, case: str, index: int, measurement: Measurement) -> Sample:
    return Sample(system=system, variant="", case=case, round=index, measurement=measurement)
