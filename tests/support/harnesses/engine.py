"""Runs prompts on a decoder through the scheduler, and builds engines on tiny checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.dtypes import block_bytes
from manyhats.engine.backends.plan import int32
from manyhats.engine.backends.wants import NO_TARGETS, Wants
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.config import EngineConfig, resolve
from manyhats.engine.engine import Engine
from manyhats.engine.loop.plan import step_plan
from manyhats.engine.opening import open_engine
from manyhats.engine.output import FinishReason, StepOutput, TokenOutput, Usage
from manyhats.engine.request import Request, ResponseOptions, SamplingParams, StoppingParams
from manyhats.engine.sampling.sampler import choices_of
from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.schedule import Chunk, SchedulerConfig
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from support.fakes.ahead import AheadBackend, watch_blocks
from support.harnesses.backends import default_backend


def load_tiny(
    directory: Path, quantization: Literal["nf4", "none"] = "none", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A tiny checkpoint; its NF4 cache lies beside it."""
    return load_model(
        str(directory), quantization=quantization, dtype=dtype, home=directory.parent / "manyhats-home"
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence of a run: it joins at step ``joins``, and decodes ``new_tokens`` greedily."""

    token_ids: Seq[int]
    slot: int = 0
    new_tokens: int = 6
    joins: int = 0


@dataclass(slots=True)
class Ran:
    """What became of one prompt: the logits of every position that was asked for, and all its tokens."""

    logits: dict[int, Tensor] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def stacked(self) -> Tensor:
        """The logits in the order of their positions."""
        return torch.stack([self.logits[position] for position in sorted(self.logits)])


class Runner:
    """A model on a backend, with adapters loaded and a KV pool; each run has an empty prefix cache at first.

    The default backend on one thread, unless another is given; adapters have the cache's dtype, unless told
    otherwise; float32 beside int8.
    """

    def __init__(
        self,
        model: LoadedModel,
        backend: Backend | None = None,
        *,
        adapters: Mapping[int, LoweredAdapter] | None = None,
        cache_dtype: str = "float32",
        adapter_dtype: str | None = None,
        num_blocks: int = 96,
        block_size: int = 16,
    ) -> None:
        self.backend: Backend = backend or default_backend()
        self.model = self.backend.prepare(model.architecture, model.weights)
        num_bytes = num_blocks * block_bytes(model.architecture, block_size, cache_dtype)
        self.cache = self.backend.new_cache(model.architecture, block_size, cache_dtype, num_bytes)
        adapter_dtype = adapter_dtype or ("float32" if cache_dtype == "int8" else cache_dtype)
        self.slots = self.backend.new_adapters(model.architecture, 40, adapter_dtype)
        for slot, adapter in (adapters or {}).items():
            self.slots.place(slot, self.slots.pack(adapter))
        self.num_blocks = num_blocks
        self.block_size = block_size

    def run(
        self,
        prompts: Seq[Prompt],
        *,
        max_tokens: int = 512,
        max_sequences: int = 8,
        num_blocks: int | None = None,
        all_logits: bool = False,
        prefix_cache: bool = False,
    ) -> list[Ran]:
        """Run all prompts to their end.

        Args:
            max_tokens: of a step; smaller ones cut prompts into chunks.
            max_sequences: that run at a time.
            num_blocks: of the pool; too few make sequences preempt each other.
            all_logits: keep those of the prompts' positions too.
            prefix_cache: whether sequences share blocks.
        """
        self.backend.start_thread()  # another test may have set another number of threads
        config = SchedulerConfig(
            max_num_sequences=min(max_sequences, max_tokens), max_num_batched_tokens=max_tokens
        )
        scheduler = Scheduler(config, BlockAllocator(num_blocks or self.num_blocks, self.block_size))
        sequences = [
            _sequence(index, prompt, all_logits, prefix_cache) for index, prompt in enumerate(prompts)
        ]
        ran = {sequence: Ran() for sequence in sequences}
        step = 0
        while scheduler.has_work or step <= max(prompt.joins for prompt in prompts):
            for sequence, prompt in zip(sequences, prompts, strict=True):
                if prompt.joins == step:
                    scheduler.add(sequence)
            self._step(scheduler, ran)
            step += 1
            if step > 2000:
                raise AssertionError("the run does not end")
        for sequence in sequences:
            result = ran[sequence]
            result.token_ids = list(sequence.token_ids)
            result.num_preemptions = sequence.num_preemptions
            result.num_cached_tokens = sequence.num_cached_tokens
        return list(ran.values())

    def _step(self, scheduler: Scheduler, ran: Mapping[Sequence, Ran]) -> None:
        schedule = scheduler.schedule()
        if not schedule.chunks:
            return
        plan = step_plan(schedule, self.block_size)
        whole = int32(range(plan.logit_rows.size))
        wants = Wants(choices_of([], [], 1), NO_TARGETS, whole)
        outcome = self.model.forward(plan, self.cache, self.slots).finish(wants).result()
        logits = torch.from_numpy(outcome.whole)
        sampled: list[tuple[Sequence, int]] = []
        first = 0
        for chunk in schedule.chunks:
            rows = logits[first : first + chunk.num_logit_rows]
            first += rows.shape[0]
            _keep(ran[chunk.sequence], chunk, rows)
            if chunk.ends_tokens:
                sampled.append((chunk.sequence, int(rows[-1].argmax())))
        assert first == logits.shape[0]
        scheduler.commit(schedule)
        for sequence, token_id in sampled:
            if sequence.num_tokens < sequence.max_num_tokens:
                scheduler.append_tokens(sequence, token_id)
            else:
                scheduler.finish(sequence)


def _keep(ran: Ran, chunk: Chunk, rows: Tensor) -> None:
    for position, row in zip(range(chunk.end - rows.shape[0], chunk.end), rows, strict=True):
        assert position not in ran.logits, "the same logits were computed twice"
        ran.logits[position] = row.clone()


def _sequence(index: int, prompt: Prompt, all_logits: bool, prefix_cache: bool) -> Sequence:
    return Sequence(
        id=str(index),
        token_ids=list(prompt.token_ids),
        max_num_tokens=len(prompt.token_ids) + prompt.new_tokens,
        slot=prompt.slot,
        cache_key=prompt.slot.to_bytes(4, "little"),
        arrival=float(index),
        logits_from=0 if all_logits else None,
        uses_prefix_cache=prefix_cache,
    )


def random_ids(seed: int, count: int, vocab_size: int) -> list[int]:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count,), generator=generator).tolist()


def random_lora(
    base: BaseDescription,
    seed: int,
    *,
    rank: int = 4,
    sites: Collection[str] | None = None,
    size: float = 0.15,
) -> LoweredAdapter:
    """A LoRA that changes the logits clearly; about a third of the sites are left out unless they are named."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    sites_of_linears = (part.site for parts in base.modules.values() for part in parts)
    for index, site in enumerate(sorted(s for s in sites_of_linears if s.name in base.linears)):
        if site.name not in sites if sites is not None else (seed + index) % 3 == 0:
            continue
        d_in, d_out = base.linears[site.name]
        a = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        deltas.append(LowRank(site, a, torch.randn(d_out, rank, generator=generator) * size, 0.5 + seed % 3))
    return LoweredAdapter(digest_of(f"lora {seed} {rank}"), tuple(deltas))


def overflowing_lora(base: BaseDescription) -> LoweredAdapter:
    """Finite weights whose product is not: the logits of its rows are NaN."""
    site = Site(0, "down_proj")
    d_in, d_out = base.linears[site.name]
    return LoweredAdapter(
        digest_of("overflowing"),
        (LowRank(site, torch.full((1, d_in), 1e30), torch.full((d_out, 1), 1e30), 1.0),),
    )


def read_lora(directory: Path, base: BaseDescription) -> LoweredAdapter:
    """A PEFT directory, through the checks and the lowering that the server uses."""
    with open_source(str(directory), [directory]) as source:
        return lower(read_adapter(source, base, AdapterLimits()).artifact, base)


def digest_of(name: str) -> str:
    """A digest as the store writes it."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def make_record(task_id: str, digest: str | None = None, version: int = 1) -> AdapterRecord:
    """A catalogue record without files."""
    return AdapterRecord(
        task_id=task_id,
        version=version,
        digest=digest or digest_of(task_id),
        method=AdapterMethod.LORA,
        state=AdapterState.ACTIVE,
        parts=(ArtifactPart(digest or digest_of(task_id)),),
        size_bytes=1,
        num_parameters=1,
        source="test",
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation, collected."""

    text: str
    tokens: tuple[TokenOutput, ...]
    prompt_tokens: tuple[TokenOutput, ...]
    finish_reason: FinishReason | None
    usage: Usage
    outputs: tuple[StepOutput, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]


async def collect(engine: Engine, request: Request) -> Answer:
    """Run a generation to its end."""
    outputs = tuple([output async for output in engine.generate(request)])
    last = outputs[-1]
    return Answer(
        text="".join(output.text for output in outputs),
        tokens=tuple(token for output in outputs for token in output.tokens),
        prompt_tokens=tuple(token for output in outputs for token in output.prompt_tokens),
        finish_reason=last.finish_reason,
        usage=last.usage,
        outputs=outputs,
    )


def make_request(
    token_ids: Seq[int],
    adapter: AdapterRecord | None = None,
    *,
    new_tokens: int = 8,
    sampling: SamplingParams | None = None,
    response: ResponseOptions | None = None,
    stopping: StoppingParams | None = None,
    **fields: Any,
) -> Request:
    """A request that ignores EOS unless ``stopping`` is given."""
    return Request(
        id="test",
        prompt_token_ids=tuple(token_ids),
        adapter=adapter,
        sampling=sampling or SamplingParams(),
        response=response or ResponseOptions(),
        stopping=stopping or StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
        **fields,
    )


@contextlib.asynccontextmanager
async def running_engine(
    model: LoadedModel,
    load: Mapping[str, LoweredAdapter] | Callable[[AdapterRecord], LoweredAdapter] | None = None,
    *,
    backend: Backend | None = None,
    **config: Any,
) -> AsyncIterator[Engine]:
    """An engine on a tiny model, float32 throughout; ``load`` gives adapters by task id."""
    by_task = load if callable(load) else lambda record: (load or {})[record.task_id]
    settings = {
        "dtype": "float32",
        "num_threads": 1,
        "kv_cache_bytes": 4 << 20,
        "max_num_sequences": 8,
        **config,
    }
    settled = resolve(EngineConfig(**settings))
    backend = backend or default_backend(settled.dtype, settled.num_threads)
    engine = open_engine(model, settled, by_task, backend=backend)
    if isinstance(backend, AheadBackend):
        watch_blocks(engine.loop.step.scheduler.allocator, backend.device)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
    if isinstance(backend, AheadBackend):
        assert not backend.device.mistakes, backend.device.mistakes


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 the other side is a thread, with no event to set
            await asyncio.sleep(0.005)
