"""The engine without gRPC: as the server puts it together, with the same threads, called in its own process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from benchmarks.measure import Measurement, throughput
from benchmarks.worker import Worker
from benchmarks.workload import Case, Workload
from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.lowering import lower
from manyhats.adapters.store import AdapterStore
from manyhats.engine.async_engine import AsyncEngine
from manyhats.engine.config import EngineConfig
from manyhats.engine.model.loader import load_model
from manyhats.engine.output import StepStats
from manyhats.engine.request import Request, StoppingParams


@dataclass(frozen=True, slots=True)
class _Step:
    """When a step ended, and what it was."""

    end_s: float
    stats: StepStats

    def decodes_only(self, num_sequences: int) -> bool:
        return self.stats.num_decode_tokens == num_sequences and not self.stats.num_prefill_tokens


class EngineSession:
    """Lives in a worker process.

    It is ``AsyncEngine``, no engine put together here: with other threads the OpenMP runtime waits in another
    way at the end of each parallel loop, and on a busy machine that alone made steps several times as long.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._steps: list[_Step] = []
        self._runner = asyncio.Runner()
        model = load_model(workload.model, quantization="nf4", dtype=torch.bfloat16)
        roots = sorted({path.parent for path in workload.adapters})
        store = AdapterStore(workload.scratch / "engine-store", model.description, roots)
        self._engine = AsyncEngine(
            model,
            EngineConfig(num_threads=workload.settings.threads),
            lambda record: lower(store.load(record), model.description),
            self._note_step,
        )
        self._records = [store.register(path.name, str(path)).record for path in workload.adapters]
        self._runner.run(self._start())
        self.measure(Case(2, min(2, len(self._records))), -1)

    def measure(self, case: Case, seed: int) -> Measurement:
        """Prefills all prompts, then decodes: the second run finds the prompts in the prefix cache."""
        settings = self._workload.settings
        began_s = time.perf_counter()
        prefill = self._run(case, seed, 1)
        # A few more tokens than steps: the sequences do not all begin in the same step.
        margin = 1 + 2 * case.num_sequences // 8
        steps = [
            (after.end_s - before.end_s, after.stats.duration_s)
            for before, after in pairwise(self._run(case, seed, settings.decode_steps + 1 + margin))
            if after.decodes_only(case.num_sequences)
        ][: settings.decode_steps]
        return throughput(
            case,
            settings.prompt_tokens,
            prefill_s=prefill[-1].end_s - began_s,
            intervals_s=[interval_s for interval_s, _ in steps],
            steps_s=[duration_s for _, duration_s in steps],
        )

    async def _start(self) -> None:
        await self._engine.start()
        for record in self._records:
            await self._engine.warm_adapter(record)

    def _note_step(self, stats: StepStats) -> None:
        """Called on the engine's thread."""
        self._steps.append(_Step(time.perf_counter(), stats))

    def _run(self, case: Case, seed: int, new_tokens: int) -> list[_Step]:
        """Runs a batch to its end."""
        self._steps = []
        self._runner.run(self._generate_all(case, seed, new_tokens))
        return self._steps

    async def _generate_all(self, case: Case, seed: int, new_tokens: int) -> None:
        prompts = self._workload.prompts(case, seed)
        await asyncio.gather(
            *(
                self._generate(prompt, self._record(case.adapter_of(row)), new_tokens)
                for row, prompt in enumerate(prompts)
            )
        )

    def _record(self, adapter: int | None) -> AdapterRecord | None:
        return None if adapter is None else self._records[adapter]

    async def _generate(self, prompt: Sequence[int], adapter: AdapterRecord | None, new_tokens: int) -> None:
        request = Request(
            id="",
            prompt_token_ids=tuple(prompt),
            adapter=adapter,
            stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
            accepted_s=time.monotonic(),
        )
        async for _ in self._engine.generate(request):
            pass


class OwnEngine:
    """A ``System`` in front of the worker."""

    name = "engine"

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def variants(self, case: Case) -> Sequence[str]:
        """It runs every case, in one way."""
        return ("",)

    def measure(self, case: Case, variant: str, seed: int) -> Measurement:
        """One run."""
        result: Measurement = self._worker.call("measure", case, seed)
        return result
