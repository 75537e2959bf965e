"""The engine by itself: its own step, on one thread, without asyncio and without gRPC."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.measure import Measurement, throughput
from benchmarks.worker import Worker
from benchmarks.workload import Case, Workload
from manyhats.adapters.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering import lower
from manyhats.adapters.reader import read_adapter
from manyhats.engine.config import EngineConfig, resolve
from manyhats.engine.engine import Engine, StepResult
from manyhats.engine.errors import EngineError
from manyhats.engine.generation import Generation, ServingModel
from manyhats.engine.jobs import Event
from manyhats.engine.kernels.cpu.backend import CpuKernels
from manyhats.engine.kernels.interface import AdapterSlots
from manyhats.engine.model.decoder import Decoder
from manyhats.engine.model.loader import LoadedModel, load_model
from manyhats.engine.request import Request, StoppingParams
from manyhats.engine.warmup import warm_up

_NUM_BLOCKS = 1024


@dataclass(frozen=True, slots=True)
class _Step:
    """When a step ended, and what it decoded."""

    end_s: float
    num_decode_tokens: int
    num_prefill_tokens: int


class EngineSession:
    """Lives in a worker process."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        config = resolve(EngineConfig(num_threads=workload.settings.threads))
        torch.set_num_threads(workload.settings.threads)
        model = load_model(workload.model, quantization="nf4", dtype=torch.bfloat16)
        kernels = CpuKernels(config.num_threads)
        decoder = Decoder(model.config, model.weights, kernels)
        cache = kernels.new_cache(model.config, _NUM_BLOCKS, config.block_size, config.kv_cache_dtype)
        slots = kernels.new_slots(model.config, max(1, len(workload.adapters)) + 1, config.dtype)
        warm_up(decoder, cache, slots, kernels)
        _load_adapters(workload.adapters, model, slots)
        self._engine = Engine(
            decoder,
            cache,
            slots,
            num_blocks=_NUM_BLOCKS,
            block_size=config.block_size,
            scheduler=config.scheduler,
        )
        self._serving = ServingModel(
            base_digest=model.description.digest,
            tokenizer=model.tokenizer,
            eos_token_ids=model.generation.eos_token_ids,
            max_context_length=model.config.max_context_length,
            vocab_size=model.config.vocab_size,
        )
        self.measure(Case(2, min(2, len(workload.adapters))), -1)

    def measure(self, case: Case, seed: int) -> Measurement:
        """Prefills all prompts, then decodes: the second run finds the prompts in the prefix cache."""
        settings = self._workload.settings
        started = time.perf_counter()
        prefill = self._run(case, seed, 1)
        # A few more tokens than steps: the sequences do not all begin in the same step.
        margin = 1 + 2 * case.num_sequences // 8
        ends = self._run(case, seed, settings.decode_steps + 1 + margin)
        steps_s = [
            after.end_s - before.end_s
            for before, after in pairwise(ends)
            if after.num_decode_tokens == case.num_sequences and not after.num_prefill_tokens
        ]
        return throughput(
            case, settings.prompt_tokens, prefill[-1].end_s - started, steps_s[: settings.decode_steps]
        )

    def _run(self, case: Case, seed: int, new_tokens: int) -> list[_Step]:
        """Runs a batch to its end."""
        for row, prompt in enumerate(self._workload.prompts(case, seed)):
            _raise_errors(self._engine.add(self._job(case, row, seed, prompt, new_tokens)))
        steps: list[_Step] = []
        while self._engine.has_work:
            result: StepResult = self._engine.step()
            _raise_errors(result.events)
            if result.stats is not None:
                steps.append(
                    _Step(
                        time.perf_counter(), result.stats.num_decode_tokens, result.stats.num_prefill_tokens
                    )
                )
        return steps

    def _job(self, case: Case, row: int, seed: int, prompt: Sequence[int], new_tokens: int) -> Generation:
        adapter = case.adapter_of(row)
        request = Request(
            id=str(row),
            prompt_token_ids=tuple(prompt),
            stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
            # The engine tells adapters apart by their records, which requests have none of here.
            cache_salt=f"{case.name} {row} {seed}",
            accepted_s=time.monotonic(),
        )
        return Generation(str(row), request, 0 if adapter is None else adapter + 1, 0.0, self._serving)


def _load_adapters(paths: Sequence[Path], model: LoadedModel, slots: AdapterSlots) -> None:
    for slot, path in enumerate(paths, 1):
        with open_source(str(path), [path.parent.resolve()]) as directory:
            artifact = read_adapter(directory, model.description, AdapterLimits()).artifact
        slots.write(slot, lower(artifact, model.description))


def _raise_errors(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event.payload, EngineError):
            raise event.payload


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
