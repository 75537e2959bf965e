"""The engine as a server uses it: requests arrive on an event loop, and run on the engine's own thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TypeVar

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.config import EngineConfig
from manyhats.engine.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    EngineError,
)
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.job import Job
from manyhats.engine.loop.probe import AdapterProbe
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.loop.serving import ServingModel, check_generation, check_length, check_scoring
from manyhats.engine.loop.thread import Loop
from manyhats.engine.output import EngineStats, ScoreOutput, StepOutput
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency.lease import Lease
from manyhats.engine.residency.loading import AdapterLoading
from manyhats.engine.residency.residency import ResidencyStats
from manyhats.engine.residency.tiers import Tier

_WARM_WAIT_S = 10.0
OutputT = TypeVar("OutputT")


class Engine:
    """Accepts requests on an event loop and runs them on its own thread; ``open_engine`` makes one.

    Args:
        config: limits, resolved.
        model: what requests need to know about it.
        loop: runs the steps.
        adapters: the resident adapters.
        probe: measures adapters.
        num_bytes: part of the model → its resident bytes, without adapters.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ServingModel,
        loop: Loop,
        adapters: AdapterLoading,
        probe: AdapterProbe,
        num_bytes: Mapping[str, int],
    ) -> None:
        self.config = config
        self.loop = loop
        self._model = model
        self._adapters = adapters
        self._residency = adapters.residency
        self._streams = loop.streams
        self._probe = probe
        self._num_bytes = num_bytes
        self._is_draining = False
        self._is_stopped = False

    # Life

    async def start(self) -> None:
        """Compile or load the kernels, run the model once, then start the loop.

        Raises:
            EngineError: the model cannot run.
        """
        await asyncio.wrap_future(self.loop.start())
        self._streams.attach(asyncio.get_running_loop())  # requests are accepted from here on

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for up to ``drain_s``, then end the thread."""
        self._is_draining = True
        if self.is_alive:
            await self._streams.wait_empty(drain_s)
        self._is_stopped = True
        self._adapters.close()
        self.loop.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.loop.join)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self.loop.is_alive

    @property
    def stats(self) -> EngineStats:
        """A snapshot; callable from any thread."""
        scheduler = self.loop.step.scheduler
        allocator = scheduler.allocator
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._adapters.num_waiting,
            kv_blocks_used=allocator.num_used,
            kv_blocks_cached=allocator.num_cached,
            kv_blocks_total=allocator.num_blocks,
            heartbeat_s=self.loop.heartbeat_s,
            waiting_tasks=tuple(sorted(self._adapters.waiting_tasks | self._residency.tasks_without_slot())),
            is_at_standstill=self.loop.is_at_standstill,
        )

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """Resident bytes by part."""
        return {**self._num_bytes, "adapters": self._residency.stats.resident_bytes}

    @property
    def max_context_length(self) -> int:
        """The maximum of prompt and output tokens together, including virtual tokens."""
        return self._model.max_context_length

    # Adapters

    @property
    def residency_stats(self) -> ResidencyStats:
        """Counts of loads and evictions, and bytes."""
        return self._residency.stats

    def adapter_tiers(self) -> Mapping[str, Tier]:
        """Digest → tier of each loaded adapter."""
        return self._residency.tiers()

    def resident_digests(self) -> frozenset[str]:
        """Digests of the loaded adapters."""
        return frozenset(self._residency.tiers())

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request for this version is running or waiting; other versions with the same bytes do not count."""
        return self._residency.in_use(record) or self._adapters.in_use(record)

    async def warm_adapter(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        """Load an adapter, now or as soon as there is room for it.

        Args:
            record: the version.
            lowered: the lowered adapter if already known; None reads it from the store.

        Raises:
            AdapterError: it cannot be loaded.
            AdapterCapacityError: there was no room for some seconds.
        """
        self._check_accepting()
        await self._adapters.warm(record, lowered, max_wait_s=_WARM_WAIT_S)

    def forget_adapter(self, digest: str) -> None:
        """Free an adapter's memory once no request runs on it."""
        self._residency.forget(digest)

    def probe(self, adapter: LoweredAdapter) -> float:
        """How far an adapter moves the base model's answers, in nats; exactly 0 if it changes nothing.

        The mean, over the positions of a short fixed prompt that reaches the adapter's own tokens, of the largest
        change of any token's log-probability. Blocks; call it on a worker thread, never the event loop's or the
        engine's. One probe runs at a time, alongside requests.

        Raises:
            AdapterInvalidError: its logits are not finite, but the base's are.
            AdapterTooLargeError: its virtual tokens leave no room for the prompt.
            ModelError: the kernels cannot run it.
            DrainingError: the engine is shutting down.
            EngineDeadError: the engine is not running, or ended in the meantime.
        """
        self._check_accepting()
        return self._probe.measure(adapter)

    # Requests

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Run one generation; closing the iterator ends it and frees its blocks within one step.

        It gets at most ``max_unread_outputs`` and ``max_unread_bytes`` ahead of its reader, then pauses.

        Raises:
            RequestError: it can never be served.
            EngineError: anything else that ended it.
            AdapterError: its adapter cannot be loaded.
        """
        check_generation(request, self._model.vocab_size, self._model.eos_of(request))
        config = self.config
        backlog = Backlog(config.max_unread_outputs, config.max_unread_bytes, config.unread_limit_s)
        outputs = self._submit(
            request, lambda job_id, lease: Generation(job_id, request, lease, self._model, backlog)
        )
        try:
            async for output in outputs:
                yield output
                if backlog.take(output):  # asking for the next one means being done with this one
                    self.loop.wake()
        finally:
            await outputs.aclose()

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        """Run one scoring; cancelling it frees its blocks within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: anything else that ended it.
            AdapterError: its adapter cannot be loaded.
        """
        check_scoring(request, self._model.vocab_size, self.config.max_score_tokens)
        outputs = self._submit(request, lambda job_id, lease: Scoring(job_id, request, lease, self._model))
        try:
            async for output in outputs:
                return output
        finally:
            await outputs.aclose()
        raise EngineDeadError("the scoring ended without a result")

    async def _submit(
        self, request: Request | ScoreRequest, make_job: Callable[[str, Lease], Job[OutputT]]
    ) -> AsyncGenerator[OutputT, None]:
        self._check_accepting()
        check_length(request, 0, self.max_context_length)  # without loading the adapter for it
        job_id = self.loop.new_id()
        with self._streams.expected():
            lease = await self._lease(request)
            try:
                self._check_running()
                check_length(request, lease.num_virtual_tokens, self.max_context_length)
                job = make_job(job_id, lease)
            except BaseException:
                lease.release()
                raise
            stream = self._streams.open(job_id, lease.release)
        self.loop.submit(lambda: self.loop.step.add(job))
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
                self.loop.submit(lambda: self.loop.step.cancel(job_id))

    async def _lease(self, request: Request | ScoreRequest) -> Lease:
        """Lease a request's adapter; returns once it is loaded."""
        adapter = request.adapter
        if adapter is None:
            return Lease()
        lease = self._residency.try_lease(adapter)
        if lease is not None:
            return lease
        started = time.monotonic()
        self.loop.step.scheduler.check_queue(self._adapters.num_waiting)
        limit_s = None if request.deadline_s is None else request.deadline_s - started
        try:
            async with asyncio.timeout(limit_s) as limit:
                lease = await self._adapters.lease(adapter)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceededError("the deadline passed while waiting for the adapter") from None
        lease.load_s, lease.has_waited = time.monotonic() - started, True
        return lease

    def _check_accepting(self) -> None:
        self._check_running()
        if self._is_draining:
            raise DrainingError("the server is shutting down")

    def _check_running(self) -> None:
        if self.loop.failure is not None or not self._streams.is_attached:
            raise EngineDeadError("the engine has ended")
        if self._is_stopped:
            raise DrainingError("the server is shutting down")
