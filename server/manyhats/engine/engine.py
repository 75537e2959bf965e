"""The one thread boundary: asyncio on one side, the engine's thread on the other."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.cpu.backend import CpuKernels
from manyhats.engine.backends.cpu.compile import counted_compilation
from manyhats.engine.backends.decoder import Decoder
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import EngineConfig, num_blocks_of, resolve
from manyhats.engine.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    EngineError,
)
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.checks import check_generation, check_length, check_scoring
from manyhats.engine.loop.choosing_ahead import choosing_compiled_ahead
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.internal_jobs import InternalJobs
from manyhats.engine.loop.jobs import Event, Job, Output
from manyhats.engine.loop.prefix_pool import EnginePrefixPool
from manyhats.engine.loop.probe import AdapterProbe, probe_prompt
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.loop.serving import ServingModel, Start
from manyhats.engine.loop.step import Engine
from manyhats.engine.loop.streams import Streams
from manyhats.engine.loop.thread import EngineThread
from manyhats.engine.loop.warmup import warm_up
from manyhats.engine.output import EngineStats, ScoreOutput, StepOutput, StepStats
from manyhats.engine.progress import LatestProgress, Progress, no_progress
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency.loading import AdapterLoading
from manyhats.engine.residency.residency import AdapterResidency, LoadAdapter, ResidencyStats
from manyhats.engine.threads.background import Background
from manyhats.engine.threads.processors import TakenProcessors

_WARM_WAIT_S = 10.0


class AsyncEngine:
    """Accepts requests on an event loop and runs them on a thread of its own.

    Args:
        model: the resident base; its weights are packed for the backend here.
        config: limits and sizes.
        load_adapter: reads and lowers an artifact; called on loader threads.
        on_step: called on the engine's thread after each step.
        background: work beside the engine's, which is left a processor while it lasts.
        progress: told how many kernels are compiled; called on the engine's thread.
        taken_processors: what other processes take; by default what the system says.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        load_adapter: LoadAdapter,
        on_step: Callable[[StepStats], None] = lambda stats: None,
        background: Background | None = None,
        progress: Progress = no_progress,
        taken_processors: TakenProcessors | None = None,
    ) -> None:
        config = resolve(config)
        self._background = background or Background()
        self._progress = progress
        self._taken_processors = taken_processors or TakenProcessors()
        self.model = model
        self.config = config
        self._kernels = CpuKernels(config.num_threads or None, is_exact=config.dtype == "float32")
        self._decoder = Decoder(model.architecture, model.weights, self._kernels)
        num_blocks = num_blocks_of(config, model.architecture)
        self._cache = self._kernels.new_cache(
            model.architecture, num_blocks, config.block_size, config.kv_cache_dtype
        )
        self._probe_slot = config.max_loaded_adapters + 1  # after the base model's and the loaded adapters'
        self._slots = self._kernels.new_slots(model.architecture, self._probe_slot + 1, config.dtype)
        self._engine = Engine(
            self._decoder,
            self._cache,
            self._slots,
            self._kernels,
            num_blocks=num_blocks,
            block_size=config.block_size,
            scheduler=config.scheduler,
        )
        capacity = num_blocks * config.block_size
        self.max_context_length = min(model.architecture.max_context_length, capacity)
        self._serving = ServingModel(
            base_digest=model.description.digest,
            tokenizer=model.tokenizer,
            eos_token_ids=model.generation.eos_token_ids,
            max_context_length=self.max_context_length,
            vocab_size=model.architecture.vocab_size,
        )
        self._on_step = on_step
        self._thread = EngineThread(
            self._engine,
            prepare=self._prepare,
            before_step=self._share_processors,
            publish=self._publish,
            on_step=lambda stats: self._on_step(stats),
            on_end=self._end,
        )
        self._jobs = InternalJobs(self._engine, self._thread.submit, self._background)
        prefixes = EnginePrefixPool(self._jobs, capacity)
        self._residency = AdapterResidency(
            self._slots, config.max_loaded_adapters, config.max_adapter_bytes, load_adapter, prefixes
        )
        self._probe = self._new_probe()
        self._loading = AdapterLoading(self._residency, self._background)
        self._streams = Streams(self._residency.release)
        self._ids = itertools.count(1)
        self._is_draining = False
        self._is_stopped = False

    def _new_probe(self) -> AdapterProbe:
        return AdapterProbe(
            self._jobs,
            self._slots,
            self._probe_slot,
            prompt=probe_prompt(self.model.tokenizer, self.model.architecture.vocab_size),
            embeddings=self.model.weights.embedding,
            max_context_length=self.max_context_length,
        )

    # Life

    async def start(self) -> None:
        """Compiles or loads the kernels, runs the model once, then starts the loop.

        Raises:
            EngineError: the model does not run.
        """
        await asyncio.wrap_future(self._thread.start())
        self._streams.attach(asyncio.get_running_loop())  # from here on requests are accepted

    def _prepare(self) -> None:
        """On the engine's thread, where every later step runs: it is the one with the kernels' threads."""
        compiled = LatestProgress(self._progress)
        with counted_compilation(compiled), choosing_compiled_ahead(compiled.again) as wait:
            warm_up(self._decoder, self._cache, self._slots, self._probe_slot, self._kernels, wait)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, lets running ones finish for up to ``drain_s``, then ends the thread."""
        self._is_draining = True
        if self.is_alive:
            await self._streams.wait_empty(drain_s)
        self._is_stopped = True
        self._loading.close()
        self._thread.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive

    @property
    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""
        scheduler, allocator = self._engine.scheduler, self._engine.allocator
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._loading.num_waiting,
            kv_blocks_used=allocator.num_used,
            kv_blocks_cached=allocator.num_cached,
            kv_blocks_total=allocator.num_blocks,
            heartbeat_s=self._thread.heartbeat_s,
            waiting_tasks=self._loading.waiting_tasks,
            is_at_standstill=self._thread.is_at_standstill,
        )

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """Resident bytes by part."""
        return {
            "base": self._decoder.linear_bytes,
            "embeddings": self._decoder.embedding_bytes,
            "adapters": self._residency.stats.resident_bytes,
            "kv": self._cache.num_bytes,
        }

    @property
    def kernels_name(self) -> str:
        """The backend's name."""
        return self._kernels.name

    # Adapters

    @property
    def residency_stats(self) -> ResidencyStats:
        """Loads, evictions and bytes."""
        return self._residency.stats

    def resident_digests(self) -> frozenset[str]:
        """Digests of the loaded adapters."""
        return self._residency.resident_digests()

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request for this version runs or waits now, whatever other versions are made of the same bytes."""
        return self._residency.in_use(record) or self._loading.in_use(record)

    async def warm_adapter(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        """Loads an adapter now, or as soon as there is a slot for it.

        Args:
            record: the version.
            lowered: what it comes to, where that is at hand; None reads it.

        Raises:
            AdapterError: it cannot be loaded.
            AdapterCapacityError: every slot has been in use for some seconds.
        """
        self._check_accepting()
        await self._loading.warm(record, lowered, max_wait_s=_WARM_WAIT_S)

    def forget_adapter(self, digest: str) -> None:
        """Frees its memory once no request runs on it."""
        self._residency.forget(digest)

    def probe(self, adapter: LoweredAdapter) -> float:
        """How far an adapter moves the base model's answers, in nats; exactly 0 where it changes nothing.

        The mean, over the positions of a short fixed prompt that reaches the adapter's own tokens, of the largest
        change of any token's log-probability. Blocks; call it on a worker thread, never the event loop's or the
        engine's. One probe runs at a time, beside the requests.

        Raises:
            AdapterInvalidError: its logits are not finite; the base's are.
            AdapterTooLargeError: its virtual tokens leave no room for the prompt.
            ModelError: the kernels cannot run it.
            DrainingError: the engine takes no more.
            EngineDeadError: the engine does not run, or ended meanwhile.
        """
        self._check_accepting()
        return self._probe.measure(adapter)

    # Requests

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Runs one generation; closing the iterator ends it, and its blocks are free within one step.

        It gets ahead of the iterator's reader by ``max_unread_outputs`` and ``max_unread_bytes`` at most, then pauses.

        Raises:
            RequestError: it can never be served.
            EngineError: what else ended it.
            AdapterError: its adapter cannot be loaded.
        """
        check_generation(request, self._serving.vocab_size, self._serving.eos_of(request))
        config = self.config
        backlog = Backlog(config.max_unread_outputs, config.max_unread_bytes, config.unread_limit_s)
        outputs = self._submit(
            request, lambda job_id, start: Generation(job_id, request, start, self._serving, backlog)
        )
        try:
            async for output in outputs:
                if isinstance(output, StepOutput):
                    yield output
                    if backlog.take(output):  # who asks for the next one is through with this one
                        self._thread.wake()
        finally:
            await outputs.aclose()

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        """Runs one scoring; cancelling it frees its blocks within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: what else ended it.
            AdapterError: its adapter cannot be loaded.
        """
        check_scoring(request, self._serving.vocab_size, self.config.max_score_tokens)
        outputs = self._submit(request, lambda job_id, start: Scoring(job_id, request, start, self._serving))
        try:
            async for output in outputs:
                if isinstance(output, ScoreOutput):
                    return output
        finally:
            await outputs.aclose()
        raise EngineDeadError("the scoring ended without a result")

    async def _submit(
        self, request: Request | ScoreRequest, make_job: Callable[[str, Start], Job]
    ) -> AsyncGenerator[Output, None]:
        self._check_accepting()
        check_length(request, 0, self.max_context_length)  # without loading the adapter for it
        job_id = str(next(self._ids))
        with self._streams.expected():
            start = await self._start_of(request)
            try:
                self._check_running()
                check_length(request, start.num_virtual_tokens, self.max_context_length)
                job = make_job(job_id, start)
            except BaseException:
                if request.adapter is not None:
                    self._residency.release(request.adapter)
                raise
            stream = self._streams.open(job_id, request.adapter)
        self._thread.submit(lambda: self._engine.add(job))
        is_last = False
        try:
            while not is_last:
                event = await stream.events.get()
                is_last = event.is_last
                if isinstance(event.payload, EngineError):
                    raise event.payload
                yield event.payload
        finally:
            if not is_last:
                self._thread.submit(lambda: self._engine.cancel(job_id))

    async def _start_of(self, request: Request | ScoreRequest) -> Start:
        """Where a request begins; its adapter is pinned, once it is loaded."""
        adapter = request.adapter
        if adapter is None:
            return Start()
        started = time.monotonic()
        resident = self._residency.try_acquire(adapter)
        if resident is not None:
            return Start(resident.slot, resident.virtual, time.monotonic() - started)
        self._engine.scheduler.check_queue(self._loading.num_waiting)
        limit_s = None if request.deadline_s is None else request.deadline_s - started
        try:
            async with asyncio.timeout(limit_s) as limit:
                resident = await self._loading.acquire(adapter)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceededError("the deadline passed while the adapter was waited for") from None
        return Start(resident.slot, resident.virtual, time.monotonic() - started, has_waited=True)

    def _check_accepting(self) -> None:
        self._check_running()
        if self._is_draining:
            raise DrainingError("the server is shutting down")

    def _check_running(self) -> None:
        if self._thread.failure is not None or not self._streams.is_attached:
            raise EngineDeadError("the engine has ended")
        if self._is_stopped:
            raise DrainingError("the server is shutting down")

    # On the engine's thread

    def _share_processors(self) -> None:
        """A step's loops end with their slowest thread: better one fewer than one that has half a processor."""
        num_for_background = 1 if self._background.is_busy else 0
        self._kernels.leave_processors(self._taken_processors.count() + num_for_background)

    def _publish(self, events: list[Event]) -> bool:
        return self._streams.publish([event for event in events if not self._jobs.take(event)])

    def _end(self) -> None:
        self._jobs.close()
        self._streams.end("the engine has ended" if self._thread.failure is None else "the engine failed")
