"""The server, through gRPC: a client in a process of its own opens a stream for each sequence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from benchmarks.measure import Measurement, percentile
from benchmarks.worker import Worker
from benchmarks.workload import LORA_CASES, Adapter, Case, Workload
from manyhats.client import AsyncClient


@dataclass(frozen=True, slots=True)
class Stream:
    """When a request was sent, and when each of its tokens arrived."""

    sent_s: float
    tokens_s: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        return self.tokens_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.tokens_s)]


class ClientSession:
    """Lives in a worker process; imports nothing of the engine."""

    def __init__(self, workload: Workload, target: str) -> None:
        self._workload = workload
        self._target = target

    def register(self) -> None:
        """Registers every adapter."""
        asyncio.run(self._register())

    def measure(self, case: Case, seed: int) -> Measurement:
        """Times to first token and between tokens of new prompts; then steps, of prompts the server has seen.

        The second time the prefix cache holds the prompts, so that all streams decode together.
        """
        return asyncio.run(self._measure(case, seed))

    def run(self, case: Case, num_tokens: int) -> None:
        """All streams of a case at once, to their end; their prompts are the same each time."""
        asyncio.run(self._run(case, num_tokens))

    async def _run(self, case: Case, num_tokens: int) -> None:
        async with AsyncClient(self._target) as client:
            await self._burst(client, case, 0, num_tokens)

    async def _register(self) -> None:
        async with AsyncClient(self._target) as client:
            for adapter, path in self._workload.adapters.items():
                if adapter.method == "lora":
                    await client.register_adapter(adapter.name, str(path))

    async def _measure(self, case: Case, seed: int) -> Measurement:
        settings = self._workload.settings
        num_tokens = settings.decode_steps + 1
        async with AsyncClient(self._target) as client:
            await client.server_info()  # connects
            cold = [
                stream
                for burst in range(-(-settings.first_token_requests // case.num_sequences))
                for stream in await self._burst(client, case, 1000 * seed + burst, num_tokens)
            ]
            margin = 2 * case.num_sequences // 8
            warm = await self._burst(client, case, 1000 * seed, num_tokens + margin)
        return _summary(case, cold, warm)

    async def _burst(self, client: AsyncClient, case: Case, seed: int, num_tokens: int) -> list[Stream]:
        """All streams of a case at once, to their end."""
        prompts = self._workload.prompts(case, seed)
        return await asyncio.gather(
            *(
                self._stream(client, prompt, case.adapter_of(row), num_tokens)
                for row, prompt in enumerate(prompts)
            )
        )

    async def _stream(
        self, client: AsyncClient, prompt: list[int], adapter: Adapter | None, num_tokens: int
    ) -> Stream:
        task_id = "" if adapter is None else adapter.name
        arrived: list[float] = []
        sent_s = time.perf_counter()
        async with client.generate_stream(
            prompt, task_id=task_id, max_new_tokens=num_tokens, ignore_eos=True
        ) as stream:
            async for chunk in stream:
                arrived += [time.perf_counter()] * len(chunk.tokens)
        return Stream(sent_s, tuple(arrived))


def _summary(case: Case, cold: Sequence[Stream], warm: Sequence[Stream]) -> Measurement:
    first_s = [stream.first_token_s for stream in cold]
    gaps_s = [gap for stream in cold for gap in stream.gaps_s]
    steps_s, mean_step_s = common_steps(warm)
    return Measurement(
        {
            "first_token_p50_ms": 1000 * median(first_s),
            "first_token_p99_ms": 1000 * percentile(first_s, 99),
            "inter_token_p50_ms": 1000 * median(gaps_s),
            "inter_token_p99_ms": 1000 * percentile(gaps_s, 99),
            "decode_tokens_per_s": case.num_sequences / median(steps_s),
            "step_ms": 1000 * median(steps_s),
            "mean_step_ms": 1000 * mean_step_s,
        },
        {"first_token": first_s, "inter_token": gaps_s, "step": steps_s},
    )


def common_steps(streams: Sequence[Stream]) -> tuple[list[float], float]:
    """Gaps between tokens while all streams decode, and the mean time of a step then, in seconds.

    Streams that are over before the last one has begun have no such time; all their gaps are taken.
    """
    begin_s = max(stream.tokens_s[0] for stream in streams)
    end_s = min(stream.tokens_s[-1] for stream in streams)
    if begin_s >= end_s:
        gaps = [gap for stream in streams for gap in stream.gaps_s]
        return gaps, sum(gaps) / len(gaps)
    gaps = [
        after - before
        for stream in streams
        for before, after in pairwise(stream.tokens_s)
        if before >= begin_s and after <= end_s
    ]
    if not gaps:
        gaps = [end_s - begin_s]
    num_tokens = sum(begin_s < at <= end_s for stream in streams for at in stream.tokens_s)
    return gaps, len(streams) * (end_s - begin_s) / num_tokens


class Service:
    """A ``System`` in front of the worker."""

    name = "grpc"

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        worker.call("register")
        worker.call("measure", Case(2), -1)

    def variants(self, case: Case) -> Sequence[str]:
        """It runs the base alone, and as many LoRAs as there are streams."""
        return ("",) if not case.num_adapters or case == LORA_CASES[-1] else ()

    def measure(self, case: Case, variant: str, seed: int) -> Measurement:
        """One run."""
        result: Measurement = self._worker.call("measure", case, seed)
        return result
