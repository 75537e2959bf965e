"""The engine as a server uses it: requests arrive on an event loop, and run on the engine's own thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.config import EngineConfig
from manyhats.engine.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
)
from manyhats.engine.loop.backlog import Backlog
from manyhats.engine.loop.encoding import Encoding
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.job import Job
from manyhats.engine.loop.probe import AdapterProbe
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.loop.serving import (
    ANY_VOCAB_SIZE,
    ServingModel,
    check_encoding,
    check_generation,
    check_length,
    check_scoring,
)
from manyhats.engine.loop.streams import Stream
from manyhats.engine.loop.thread import Loop
from manyhats.engine.output import EncodeOutput, EngineStats, ScoreOutput, StepOutput, joined
from manyhats.engine.request import EncodeRequest, Request, ScoreRequest
from manyhats.engine.residency.lease import Lease
from manyhats.engine.residency.loading import AdapterLoading
from manyhats.engine.residency.residency import ResidencyStats
from manyhats.engine.residency.tiers import Tier
from manyhats.engine.sampling.grammars import Grammars
from manyhats.engine.sampling.matcher import Matcher
from manyhats.engine.text.tokenizer import Tokenizer

_WARM_WAIT_S = 10.0


class Engine:
    """Accepts requests on an event loop and runs them on its own thread; ``open_engine`` makes one.

    Args:
        config: limits, resolved.
        model: what requests need to know about it.
        loop: runs the steps.
        adapters: the resident adapters.
        probe: measures adapters.
        num_bytes: part of the model → its resident bytes, without adapters.

    Attributes:
        grammars: compiles the constraints of requests.
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
        self.grammars = Grammars(model.num_ids)
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

    async def stop(self, drain_s: float = 0.0, step_limit_s: float | None = None) -> None:
        """Refuse new requests, let running ones finish for up to ``drain_s``, then end the thread.

        If its step takes longer than ``step_limit_s``, the thread is left to itself, and ends with the process.
        """
        self._is_draining = True
        if self.is_alive:
            await self._streams.wait_empty(drain_s)
        self._is_stopped = True
        self._adapters.close()
        self.grammars.close()
        self.loop.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.loop.join, step_limit_s)
        self._residency.close()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self.loop.is_alive

    @property
    def silent_s(self) -> float:
        """For how long it has made no turn (``Watch``); callable from any thread, whatever the engine's hangs in."""
        return self.loop.watch.silent_s

    @property
    def position(self) -> str:
        """Where its thread is now, as a stack; callable from any other thread."""
        return self.loop.position

    def call_when_silent(self, limit_s: float, on_hang: Callable[[float], None]) -> None:
        """Have ``on_hang`` called with the seconds, on a thread of its own, once it has been silent for so long."""
        self.loop.watch.call_at(limit_s, on_hang)

    @property
    def stats(self) -> EngineStats:
        """A snapshot; callable from any thread."""
        scheduler = self.loop.step.scheduler
        allocator = scheduler.allocator
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._num_preparing,
            kv_blocks_used=allocator.num_used,
            kv_blocks_cached=allocator.num_cached,
            kv_blocks_total=allocator.num_blocks,
            heartbeat_s=self.loop.heartbeat_s,
            kv_block_size=allocator.block_size,
            waiting_adapters=tuple(sorted(self._adapters.waiting | self._residency.without_slot())),
        )

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """Resident bytes by part."""
        return {**self._num_bytes, "adapters": self._residency.stats.resident_bytes}

    @property
    def max_context_length(self) -> int:
        """The maximum of prompt and output tokens together, including virtual tokens."""
        return self._model.max_context_length

    def eos_token_ids(self, tokenizer: Tokenizer | None = None) -> frozenset[int]:
        """The ids that end an answer in a task's own tokenizer; None for the base's."""
        return self._model.eos_with(tokenizer)

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

    async def pin_adapter(self, record: AdapterRecord) -> None:
        """Load an adapter, and keep it in memory until it is unpinned or forgotten.

        Raises:
            PinLimitError: the pinned adapters would not fit in memory.
            AdapterError: it cannot be loaded.
            AdapterCapacityError: there was no room for some seconds.
        """
        self._check_accepting()
        await self._adapters.pin(record, max_wait_s=_WARM_WAIT_S)

    def unpin_adapter(self, digest: str) -> None:
        """Let an adapter make room for others again."""
        self._residency.unpin(digest)

    def pinned_digests(self) -> frozenset[str]:
        """Digests of the adapters that stay in memory."""
        return self._residency.pinned()

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

        It gets at most ``max_unread_outputs`` and ``max_unread_bytes`` ahead of its reader, then pauses. What has come
        while the reader was busy with the output before arrives as one, but for the first.

        Raises:
            RequestError: it can never be served.
            EngineError: anything else that ended it.
            AdapterError: its adapter cannot be loaded.
        """
        config = self.config
        backlog = Backlog(config.max_unread_outputs, config.max_unread_bytes, config.unread_limit_s)
        stream = await self._submit(
            request,
            lambda job_id, lease, matcher: Generation(job_id, request, lease, self._model, backlog, matcher),
            lambda vocab_size: check_generation(request, vocab_size, self._model.eos_of(request)),
        )
        limit: int | None = 1  # the first output says when the answer began
        try:
            while not stream.is_over:
                outputs = await stream.take(limit)
                limit = None
                yield joined(outputs)
                if backlog.take(len(outputs)):  # asking for the next one means being done with these
                    self.loop.wake()
        finally:
            self._leave(stream)

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        """Run one scoring; cancelling it frees its blocks within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: anything else that ended it.
            AdapterError: its adapter cannot be loaded.
        """
        stream = await self._submit(
            request,
            lambda job_id, lease, matcher: Scoring(job_id, request, lease, self._model),
            lambda vocab_size: check_scoring(request, vocab_size, self.config.max_score_tokens),
        )
        try:
            (output,) = await stream.take()
        finally:
            self._leave(stream)
        assert isinstance(output, ScoreOutput)
        return output

    async def encode(self, request: EncodeRequest) -> EncodeOutput:
        """Run one encoding; cancelling it frees its blocks within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: anything else that ended it.
            AdapterError: its adapter cannot be loaded.
        """
        stream = await self._submit(
            request,
            lambda job_id, lease, matcher: self._encoding(job_id, request, lease),
            lambda vocab_size: check_encoding(request, vocab_size, self._model.padding_id),
        )
        try:
            (output,) = await stream.take()
        finally:
            self._leave(stream)
        assert isinstance(output, EncodeOutput)
        return output

    def _encoding(self, job_id: str, request: EncodeRequest, lease: Lease) -> Encoding:
        own = lease.head
        pooling = request.pooling or (self._model.pooling if own is None else own.pooling)
        return Encoding(job_id, request, lease, self._model, own if request.applies_head else None, pooling)

    async def _submit(
        self,
        request: Request | ScoreRequest | EncodeRequest,
        make_job: Callable[[str, Lease, Matcher | None], Job[Any]],
        check: Callable[[int], None],
    ) -> Stream:
        """The stream of a request's job, which is on its way to the engine's thread.

        ``check`` compares the request's ids with a number of tokens; an adapter's own is known once it is loaded.
        """
        check(self._model.vocab_size if request.adapter is None else ANY_VOCAB_SIZE)
        self._check_accepting()
        check_length(request, 0, self.max_context_length)  # without loading the adapter for it
        self.check_queue(request.adapter, request.num_tokens, request.deadline_s)
        job_id = self.loop.new_id()
        with self._streams.expected():
            matcher = await self._matcher(request) if isinstance(request, Request) else None
            lease = await self._lease(request)
            try:
                self._check_running()
                check_length(request, lease.num_virtual_tokens, self.max_context_length)
                if request.adapter is not None:
                    check(self._model.vocab_size_of(lease))
                job = make_job(job_id, lease, matcher)
            except BaseException:
                lease.release()
                raise
            stream = self._streams.open(job_id, lease.release)
        self.loop.submit(lambda: self.loop.step.add(job))
        return stream

    def check_queue(
        self, adapter: AdapterRecord | None = None, num_tokens: int = 0, deadline_s: float | None = None
    ) -> None:
        """Refuse now what the engine's thread would refuse after its step; before anything is done for it.

        Args:
            adapter: of a request; None for the base model.
            num_tokens: of its prompt, as far as that is known.
            deadline_s: when it must be answered.

        Raises:
            QueueFullError: it is refused.
        """
        task = "" if adapter is None else adapter.task_id
        self.loop.step.scheduler.check_queue(task, num_tokens=num_tokens, deadline_s=deadline_s)

    def _leave(self, stream: Stream) -> None:
        """Read no more of a stream: its job ends within a step, unless it has."""
        if not stream.is_over:
            self.loop.submit(lambda: self.loop.step.cancel(stream.job_id))

    async def _lease(self, request: Request | ScoreRequest | EncodeRequest) -> Lease:
        """Lease a request's adapter; returns once it is loaded."""
        adapter = request.adapter
        if adapter is None:
            return Lease()
        lease = self._residency.try_lease(adapter)
        if lease is not None:
            return lease
        started = time.monotonic()
        self.loop.step.scheduler.check_queue(adapter.task_id, self._num_preparing)
        async with _by_deadline(request, "the adapter"):
            lease = await self._adapters.lease(adapter, request.priority)
        lease.load_s, lease.has_waited = time.monotonic() - started, True
        return lease

    async def _matcher(self, request: Request) -> Matcher | None:
        """The matcher of a request's constraint; returns once that is compiled."""
        if request.constraint is None:
            return None
        task = "" if request.adapter is None else request.adapter.task_id
        self.loop.step.scheduler.check_queue(task, self._num_preparing)
        tokenizer, eos_token_ids = self._model.tokenizer_of(request), self._model.eos_of(request)
        async with _by_deadline(request, "the constraint"):
            return await self.grammars.matcher(request.constraint, tokenizer, eos_token_ids)

    @property
    def _num_preparing(self) -> int:
        """Requests that wait for their adapter or constraint before they are queued."""
        return self._adapters.num_waiting + self.grammars.num_waiting

    def _check_accepting(self) -> None:
        self._check_running()
        if self._is_draining:
            raise DrainingError("the server is shutting down")

    def _check_running(self) -> None:
        if self.loop.failure is not None or not self._streams.is_attached:
            raise EngineDeadError("the engine has ended")
        if self._is_stopped:
            raise DrainingError("the server is shutting down")


@asynccontextmanager
async def _by_deadline(request: Request | ScoreRequest | EncodeRequest, awaited: str) -> AsyncIterator[None]:
    """End this block at a request's deadline.

    Raises:
        DeadlineExceededError: it passed.
    """
    limit_s = None if request.deadline_s is None else request.deadline_s - time.monotonic()
    try:
        async with asyncio.timeout(limit_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError(f"the deadline passed while waiting for {awaited}") from None
