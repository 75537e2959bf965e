"""The one thread boundary: asyncio on one side, the engine's thread on the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.checks import check_generation, check_length, check_scoring
from manyhats.engine.config import EngineConfig, resolve
from manyhats.engine.engine import Engine
from manyhats.engine.errors import (
    DrainingError,
    EngineDeadError,
    EngineError,
    FieldInvalidError,
)
from manyhats.engine.generation import Generation
from manyhats.engine.jobs import Event, Job, Output
from manyhats.engine.kernels.cpu.backend import CpuKernels
from manyhats.engine.model.decoder import Decoder
from manyhats.engine.model.loader import LoadedModel
from manyhats.engine.output import EngineStats, ScoreOutput, StepOutput, StepStats
from manyhats.engine.prefix_pool import Command, EnginePrefixPool
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency import AdapterResidency, LoadAdapter, ResidencyStats, ResidentAdapter
from manyhats.engine.scoring import Scoring
from manyhats.engine.serving import ServingModel, Start
from manyhats.engine.warmup import warm_up

_HEARTBEAT_S = 0.5
_RETRY_S = 0.002
_LOADER_THREADS = 2
_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Stream:
    """Where a job's events go; ``pinned`` is the digest to release when the engine is through with it."""

    events: asyncio.Queue[Event]
    pinned: str | None
    is_ended: bool = False


class AsyncEngine:
    """Accepts requests on an event loop and runs them on a thread of its own.

    Args:
        model: the resident base; its weights are packed for the backend here.
        config: limits and sizes.
        load_adapter: reads and lowers an artifact; called on loader threads.
        on_step: called on the engine's thread after each step.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        load_adapter: LoadAdapter,
        on_step: Callable[[StepStats], None] = lambda stats: None,
    ) -> None:
        config = resolve(config)
        self.model = model
        self.config = config
        self._kernels = CpuKernels(config.num_threads or None, is_exact=config.dtype == "float32")
        self._decoder = Decoder(model.config, model.weights, self._kernels)
        num_blocks = _num_blocks(model, config)
        self._cache = self._kernels.new_cache(
            model.config, num_blocks, config.block_size, config.kv_cache_dtype
        )
        self._slots = self._kernels.new_slots(model.config, config.max_loaded_adapters + 1, config.dtype)
        self._engine = Engine(
            self._decoder,
            self._cache,
            self._slots,
            num_blocks=num_blocks,
            block_size=config.block_size,
            scheduler=config.scheduler,
        )
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._prefixes = EnginePrefixPool(self._engine, self._cache, self._inbox.put)
        self._residency = AdapterResidency(
            self._slots, config.max_loaded_adapters, config.max_adapter_bytes, load_adapter, self._prefixes
        )
        self.max_context_length = min(model.config.max_context_length, num_blocks * config.block_size)
        self._serving = ServingModel(
            base_digest=model.description.digest,
            tokenizer=model.tokenizer,
            eos_token_ids=model.generation.eos_token_ids,
            max_context_length=self.max_context_length,
            vocab_size=model.config.vocab_size,
        )
        self._on_step = on_step
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count(1)
        self._loaders = ThreadPoolExecutor(_LOADER_THREADS, thread_name_prefix="adapter-loader")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()  # set when a drain finds the last stream gone
        self._is_draining = False
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._heartbeat_s = 0.0
        self._loading_tasks: dict[str, int] = {}

    # Life

    async def start(self) -> None:
        """Compiles or loads the kernels, runs the model once, then starts the loop.

        Raises:
            EngineError: the model does not run.
        """
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(
            self._loaders, warm_up, self._decoder, self._cache, self._slots, self._kernels
        )
        self._heartbeat_s = time.time()
        self._thread.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, lets running ones finish for up to ``drain_s``, then ends the thread."""
        self._is_draining = True
        if self._streams and self.is_alive:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_s)
        self._is_stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._loaders.shutdown(wait=False, cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and self._failure is None

    @property
    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""
        scheduler, allocator = self._engine.scheduler, self._engine.allocator
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_blocks_used=allocator.num_used,
            kv_blocks_cached=allocator.num_cached,
            kv_blocks_total=allocator.num_blocks,
            heartbeat_s=self._heartbeat_s,
            waiting_tasks=tuple(sorted(self._loading_tasks)),
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

    def in_use(self, digest: str) -> bool:
        """Whether a request runs on it now."""
        return self._residency.in_use(digest)

    async def warm_adapter(self, record: AdapterRecord) -> None:
        """Loads an adapter now.

        Raises:
            AdapterError: it cannot be loaded.
            AdapterCapacityError: every slot is in use.
        """
        self._check_accepting()
        await self._acquire(record)
        self._residency.release(record.digest)

    def forget_adapter(self, digest: str) -> None:
        """Frees its memory once no request runs on it."""
        self._residency.forget(digest)

    async def _acquire(self, record: AdapterRecord) -> ResidentAdapter:
        """Pins an adapter; loads happen on a loader thread, so no other request waits for them."""
        resident = self._residency.try_acquire(record.digest)
        if resident is not None:
            return resident
        self._loading_tasks[record.task_id] = self._loading_tasks.get(record.task_id, 0) + 1
        loading = asyncio.get_running_loop().run_in_executor(self._loaders, self._residency.acquire, record)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: self._release_unused(record.digest, done))
            raise
        finally:
            self._loading_tasks[record.task_id] -= 1
            if not self._loading_tasks[record.task_id]:
                del self._loading_tasks[record.task_id]

    def _release_unused(self, digest: str, loading: asyncio.Future[ResidentAdapter]) -> None:
        if not loading.cancelled() and loading.exception() is None:
            self._residency.release(digest)

    # Requests

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Runs one generation; closing the iterator ends it, and its blocks are free within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: what else ended it.
            AdapterError: its adapter cannot be loaded.
        """
        check_generation(request, self._serving.vocab_size)
        outputs = self._submit(
            request, lambda job_id, start: Generation(job_id, request, start, self._serving)
        )
        try:
            async for output in outputs:
                if isinstance(output, StepOutput):
                    yield output
        finally:
            await outputs.aclose()

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        """Runs one scoring; cancelling it frees its blocks within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: what else ended it.
            AdapterError: its adapter cannot be loaded.
        """
        check_scoring(request, self._serving.vocab_size)
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
        start = await self._start_of(request.adapter)
        pinned = None if request.adapter is None else request.adapter.digest
        try:
            self._check_accepting()
            check_length(request, start.num_virtual_tokens, self.max_context_length)
            job = make_job(job_id, start)
        except BaseException:
            if pinned is not None:
                self._residency.release(pinned)
            raise
        stream = self._streams[job_id] = _Stream(asyncio.Queue(), pinned)
        self._inbox.put(lambda: self._engine.add(job))
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
                self._inbox.put(lambda: self._engine.cancel(job_id))

    async def _start_of(self, adapter: AdapterRecord | None) -> Start:
        """Where a request on an adapter begins; the adapter is pinned."""
        if adapter is None:
            return Start()
        started = time.monotonic()
        resident = await self._acquire(adapter)
        return Start(resident.slot, resident.prefix, time.monotonic() - started)

    def _check_accepting(self) -> None:
        if self._failure is not None or self._loop is None:
            raise EngineDeadError("the engine has ended")
        if self._is_draining:
            raise DrainingError("the server is shutting down")

    # The engine's thread

    def _run(self) -> None:
        self._kernels.start_thread()
        try:
            while not self._is_stopping:
                events = self._take_commands()
                if self._engine.has_work:
                    result = self._engine.step()
                    events += result.events
                    if result.stats is not None:
                        self._on_step(result.stats)
                    elif not events:
                        self._make_room()
                self._heartbeat_s = time.time()
                self._publish(events)
        except BaseException as error:  # noqa: BLE001 whatever it was, every caller must hear that the engine is gone
            self._failure = error
        self._prefixes.close()
        self._call_loop(self._end_streams)
        if self._failure is not None:
            _log.error("engine died", exc_info=self._failure)

    def _make_room(self) -> None:
        """Nothing could run: an idle adapter's virtual tokens give way, or somebody else must finish first."""
        if not self._residency.evict_prefix():
            time.sleep(_RETRY_S)

    def _take_commands(self) -> list[Event]:
        """Runs what the event loop asked for; waits for something to do where there is nothing."""
        events: list[Event] = []
        wait = not self._engine.has_work
        while True:
            try:
                command = self._inbox.get(block=wait, timeout=_HEARTBEAT_S if wait else None)
            except queue.Empty:
                return events
            if command is not None:
                events += command()
            wait = False

    def _publish(self, events: list[Event]) -> None:
        """Hands a step's events to the event loop in one call."""
        events = [event for event in events if not self._prefixes.take(event)]
        for event in events:
            if event.is_last:
                self._unpin(self._streams[event.job_id])
        if events:
            self._call_loop(self._deliver, events)

    def _unpin(self, stream: _Stream) -> None:
        """The engine is through with a stream's adapter."""
        stream.is_ended = True
        if stream.pinned is not None:
            self._residency.release(stream.pinned)

    def _call_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._is_stopping = True

    # The event loop's side

    def _end_streams(self) -> None:
        """Tells the streams that are left when the thread has ended.

        It runs on the event loop, since a stream that joins as the thread ends is known there alone; one that
        joins later is refused.
        """
        reason = "the engine has ended" if self._failure is None else "the engine failed"
        left = [job_id for job_id, stream in self._streams.items() if not stream.is_ended]
        for job_id in left:
            self._unpin(self._streams[job_id])
        self._deliver([Event(job_id, EngineDeadError(reason), True) for job_id in left])

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams[event.job_id]
            if event.is_last:
                del self._streams[event.job_id]
            stream.events.put_nowait(event)
        if not self._streams:
            self._idle.set()


def _num_blocks(model: LoadedModel, config: EngineConfig) -> int:
    """Blocks that fit into ``kv_cache_bytes``, but no more than every sequence can use at full length."""
    itemsize = 4 if config.kv_cache_dtype == "float32" else 2
    decoder = model.config
    block_bytes = (
        2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * config.block_size * itemsize
    )
    most = config.max_num_sequences * -(-decoder.max_context_length // config.block_size)
    num_blocks = min(config.kv_cache_bytes // block_bytes, most)
    if num_blocks < 1:
        raise FieldInvalidError("engine.kv_cache_bytes", f"must be at least one block of {block_bytes} bytes")
    return int(num_blocks)
