"""The engine without gRPC: as the server puts it together, with the same threads, called in its own process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from benchmarks.measure import Measurement, throughput
from benchmarks.worker import Worker
from benchmarks.workload import HELD_COUNTS, Adapter, Case, Workload
from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.backend import Backend
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.config import EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.opening import open_engine
from manyhats.engine.output import StepStats
from manyhats.engine.request import Request, SamplingParams, StoppingParams
from manyhats.engine.threads.openmp import in_own_thread

_GREEDY = SamplingParams()
_MAX_SEQUENCES = max(64, *(2 * count for count in HELD_COUNTS))  # a task is not given the last seats


@dataclass(frozen=True, slots=True)
class Step:
    """When a step ended, what it was, and the KV blocks that were in use then."""

    end_s: float
    stats: StepStats
    num_used_blocks: int

    def decodes_only(self, num_sequences: int) -> bool:
        return self.stats.num_decode_tokens == num_sequences and not self.stats.num_prefill_tokens


class EngineSession:
    """Lives in a worker process.

    It is ``Engine``, no engine put together here: with other threads the OpenMP runtime waits in another
    way at the end of each parallel loop, and on a busy machine that alone made steps several times as long.

    Args:
        workload: model and adapters.
        config: of the engine; by default, what the benchmark needs.
        make_backend: called where the model is loaded; by default the engine opens its own.

    Attributes:
        architecture: the model's.
    """

    def __init__(
        self,
        workload: Workload,
        config: EngineConfig | None = None,
        make_backend: Callable[[], Backend] | None = None,
    ) -> None:
        self._workload = workload
        self._config = config or EngineConfig(
            num_threads=workload.settings.threads, max_num_sequences=_MAX_SEQUENCES
        )
        self._make_backend = make_backend
        self._steps: list[Step] = []
        self._runner = asyncio.Runner()
        # On a thread that ends, as the server does: its team of OpenMP threads would slow the engine's down.
        self._engine, self._records = self._runner.run(in_own_thread(self._load))
        self._runner.run(self._start())

    def _load(self) -> tuple[Engine, dict[Adapter, AdapterRecord]]:
        workload = self._workload
        model = load_model(workload.model, quantization="nf4", dtype=torch.bfloat16)
        self.architecture = model.architecture
        roots = sorted({path.parent for path in workload.adapters.values()})
        store = open_store(workload.scratch / "engine-store", model.description, roots)
        engine = open_engine(
            model,
            self._config,
            store.lower,
            backend=None if self._make_backend is None else self._make_backend(),
        )
        engine.loop.on_step = self._note_step
        records = {
            adapter: store.register(Registration(adapter.name, Uri(str(path)))).record
            for adapter, path in workload.adapters.items()
        }
        return engine, records

    def measure(self, case: Case, seed: int, prompt_tokens: int | None = None) -> Measurement:
        """Prefills all prompts, then decodes: the second run finds the prompts in the prefix cache.

        Prompts have ``prompt_tokens``, or what the settings say.
        """
        settings = self._workload.settings
        prompts = self._workload.prompts(case, seed, prompt_tokens)
        began_s = time.perf_counter()
        prefill = self.run(case, prompts, 1)
        # A few more tokens than steps: the sequences do not all begin in the same step.
        margin = 1 + 2 * case.num_sequences // 8
        steps = [
            (after.end_s - before.end_s, after.stats.duration_s)
            for before, after in pairwise(self.run(case, prompts, settings.decode_steps + 1 + margin))
            if after.decodes_only(case.num_sequences)
        ][: settings.decode_steps]
        return throughput(
            case,
            num_prompt_tokens=sum(map(len, prompts)),
            prefill_s=prefill[-1].end_s - began_s,
            intervals_s=[interval_s for interval_s, _ in steps],
            steps_s=[duration_s for _, duration_s in steps],
        )

    def count_held_blocks(self, num_requests: int) -> Measurement:
        """The blocks that virtual tokens hold while requests of one prompt tuning task decode together.

        Each request has one block of its own: its prompt and its answer fit into it.
        """
        case = Case(num_requests, 1, ("prompt",))
        for adapter in self._records.keys() - case.adapters:
            self._engine.forget_adapter(
                self._records[adapter].digest
            )  # others' virtual tokens hold blocks, too
        block_size = self._engine.config.block_size
        length = self._workload.settings.virtual_tokens + block_size // 2
        self.run(case, self._workload.prompts(case, num_requests, length), block_size // 2)
        used = [step.num_used_blocks for step in self._steps if step.decodes_only(num_requests)]
        return Measurement({"held_blocks": float(max(used) - num_requests)})

    async def _start(self) -> None:
        """Loads every adapter, and runs each once."""
        await self._engine.start()
        (prompt,) = self._workload.prompts(Case(1), -1)
        for record in (None, *self._records.values()):
            await self._generate(prompt, record, 2)

    def _note_step(self, stats: StepStats) -> None:
        """Called on the engine's thread."""
        self._steps.append(Step(time.perf_counter(), stats, self._engine.stats.kv_blocks_used))

    def run(
        self,
        case: Case,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: SamplingParams = _GREEDY,
    ) -> list[Step]:
        """Runs a batch to its end; returns its steps."""
        self._steps = []
        self._runner.run(self._generate_all(case, prompts, new_tokens, sampling))
        return self._steps

    async def _generate_all(
        self, case: Case, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: SamplingParams
    ) -> None:
        """Begins when all are with the engine: the first would else be through before the last one comes."""
        all_are_there = threading.Event()
        self._engine.loop.submit(lambda: _after(all_are_there))
        answers = asyncio.gather(
            *(
                self._generate(prompt, self._record(case.adapter_of(row)), new_tokens, sampling)
                for row, prompt in enumerate(prompts)
            )
        )
        await asyncio.sleep(0)  # each runs up to its first wait, which is for the engine
        all_are_there.set()
        await answers

    def _record(self, adapter: Adapter | None) -> AdapterRecord | None:
        return None if adapter is None else self._records[adapter]

    async def _generate(
        self,
        prompt: Sequence[int],
        adapter: AdapterRecord | None,
        new_tokens: int,
        sampling: SamplingParams = _GREEDY,
    ) -> None:
        request = Request(
            id="",
            prompt_token_ids=tuple(prompt),
            adapter=adapter,
            sampling=sampling,
            stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
            accepted_s=time.monotonic(),
        )
        async for _ in self._engine.generate(request):
            pass


def _after(event: threading.Event) -> tuple[()]:
    """A command to the engine's thread that holds it until then."""
    event.wait()
    return ()


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

    def count_held_blocks(self, num_requests: int) -> Measurement:
        """A count, no timing."""
        result: Measurement = self._worker.call("count_held_blocks", num_requests)
        return result
