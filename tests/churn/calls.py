"""Requests that end in every way, while versions change."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from churn.watching import ChurnError, Ends, held
from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.engine import Engine
from manyhats.engine.errors import (
    AdapterCapacityError,
    DeadlineExceededError,
    QueueFullError,
    StreamUnreadError,
)
from manyhats.engine.output import StepOutput
from manyhats.engine.request import Request, ScoreRequest, SpeculationParams, StoppingParams
from support.factories.tiny_models import TINY_VOCAB_SIZE
from support.harnesses.engine import random_ids, until

NUM_TASKS = 12
NUM_CALLERS = 48
NUM_SLOTS = 4
REFUSED = (QueueFullError, DeadlineExceededError, StreamUnreadError)


class Churn:
    """Requests and changes of versions, drawn from a seed.

    Args:
        engine: real.
        store: real.
        sources: directories of adapters to register.
        seed: of everything.
    """

    def __init__(self, engine: Engine, store: AdapterStore, sources: list[Path], seed: int) -> None:
        self.engine = engine
        self.store = store
        self.ends = Ends()
        self.ends.watch(engine)
        self._sources = sources
        self._rng = random.Random(seed)
        self.num_changes = 0

    async def run(self, num_requests: int, look: Callable[[], None]) -> None:
        """Let callers ask so many times, and versions change meanwhile."""
        left = iter(range(num_requests))
        changing = asyncio.create_task(self._change_versions())
        looking = asyncio.create_task(self._looking(look))
        try:
            await asyncio.gather(*(self._caller(left) for _ in range(NUM_CALLERS)))
        finally:
            for task in (changing, looking):
                task.cancel()
            await asyncio.gather(changing, looking, return_exceptions=True)
        for task in (changing, looking):
            if not task.cancelled() and task.exception() is not None:
                raise ChurnError("a version could not be changed") from task.exception()

    async def _caller(self, left: Iterator[int]) -> None:
        for _ in left:
            ask = self._rng.choice(
                (self._leave, self._read, self._read, self._give_up, self._idle, self._score)
            )
            try:
                end = await ask()
            except REFUSED as error:
                end = type(error).__name__
            except AdapterError as error:  # its version was deleted a moment ago
                end = type(error).__name__
            self.ends.seen[end] += 1

    # Ends of requests

    async def _read(self) -> str:
        """Read to the end; the last output alone says that it is the last."""
        outputs = [output async for output in self.engine.generate(self._request())]
        finished = [output.finish_reason is not None for output in outputs]
        if finished != [False] * (len(outputs) - 1) + [True]:
            raise ChurnError(f"a stream's outputs ended {finished}")
        return "read"

    async def _leave(self) -> str:
        """Close the stream in the middle, or before anything has come."""
        stream = self.engine.generate(self._request())
        async with contextlib.aclosing(stream):
            num_read = self._rng.randrange(4)
            async for _ in _first(stream, num_read):
                pass
        return "left"

    async def _give_up(self) -> str:
        """Have the whole call cancelled at any moment, as when a connection is lost."""
        call = asyncio.create_task(self._read())
        await asyncio.sleep(self._rng.expovariate(100.0))
        call.cancel()
        try:
            return await call
        except asyncio.CancelledError:
            return "given up"

    async def _idle(self) -> str:
        """Read a little and then nothing, for longer than is allowed or not quite so long."""
        if self._rng.random() > 0.02:  # it takes long
            return await self._leave()
        stream = self.engine.generate(
            self._request(stopping=StoppingParams(max_new_tokens=200, ignore_eos=True))
        )
        async with contextlib.aclosing(stream):
            async for _ in stream:
                await asyncio.sleep(self._rng.choice([0.0, 0.6]))
        return "read slowly"

    async def _score(self) -> str:
        record = self._record()
        prompt, *continuations = (self._tokens() for _ in range(self._rng.randint(2, 4)))
        call = asyncio.create_task(
            self.engine.score(
                ScoreRequest(
                    id="score",
                    prompt_token_ids=prompt,
                    continuations=tuple(continuations),
                    adapter=record,
                    deadline_s=self._deadline_s(),
                )
            )
        )
        if self._rng.random() < 0.3:
            await asyncio.sleep(self._rng.expovariate(100.0))
            call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            return "given up"
        return "scored"

    def _request(self, **fields: Any) -> Request:
        rng = self._rng
        stopping = StoppingParams(
            max_new_tokens=rng.randint(1, 12),
            ignore_eos=True,
            time_limit_s=rng.choice([None, None, None, 0.02]),
        )
        return Request(
            id="churn",
            prompt_token_ids=self._tokens(),
            adapter=self._record(),
            deadline_s=self._deadline_s(),
            priority=rng.choice([0, 0, 0, 1]),
            speculation=SpeculationParams(num_tokens=rng.choice([0, 0, 3])),
            accepted_s=time.monotonic(),
            **{"stopping": stopping, **fields},
        )

    def _tokens(self) -> tuple[int, ...]:
        """A prompt that begins like others and ends by itself."""
        shared = random_ids(self._rng.randrange(4), self._rng.choice([0, 16, 40]), TINY_VOCAB_SIZE)
        own = random_ids(self._rng.randrange(2**31), self._rng.randint(1, 24), TINY_VOCAB_SIZE)
        return (*shared, *own)

    def _record(self) -> AdapterRecord | None:
        if self._rng.random() < 0.1:
            return None
        return self.store.resolve(task_name(min(int(self._rng.expovariate(0.35)), NUM_TASKS - 1)))

    def _deadline_s(self) -> float | None:
        if self._rng.random() < 0.7:
            return None
        return time.monotonic() + self._rng.choice([-0.01, 0.0, 0.002, 0.02, 0.2])

    # Changes of versions

    async def _change_versions(self) -> None:
        """Move, replace and delete versions, as ``Registrations`` does, and load some ahead."""
        while True:
            await asyncio.sleep(self._rng.uniform(0.0, 0.1))
            task = task_name(self._rng.randrange(NUM_TASKS))
            source = self._rng.choice(self._sources)
            registered = await asyncio.to_thread(self.store.register, Registration(task, Uri(str(source))))
            versions = self.store.versions(task)
            if len(versions) > 2:
                old = self._rng.choice([each for each in versions if each.name != registered.record.name])
                for each in self.store.delete(old.name, in_use=self.engine.in_use, force=True):
                    if not self.store.has_digest(each.digest):
                        self.engine.forget_adapter(each.digest)
            if self._rng.random() < 0.3:
                # Without room in ten seconds it is in use before it is loaded, as a registration's version.
                with contextlib.suppress(AdapterError, AdapterCapacityError):
                    await self.engine.warm_adapter(self.store.resolve(task))
            self.num_changes += 1

    async def _looking(self, look: Callable[[], None]) -> None:
        while True:
            look()
            await asyncio.sleep(0.5)

    # What is left

    async def check_idle(self) -> None:
        """Check that nothing is held once every request has ended.

        Raises:
            ChurnError: something is.
        """
        engine = self.engine
        try:
            await until(lambda: not engine.loop.step.has_work)
        except TimeoutError:
            raise ChurnError(f"jobs are left: {engine.stats}") from None
        told = self.ends.told
        if told["after the end"]:
            raise ChurnError(f"{told['after the end']} events came after the last of their stream")
        await self._check_slots()
        for task in map(task_name, range(NUM_TASKS)):
            for each in self.store.delete(task, in_use=engine.in_use):  # unforced: a lease would refuse it
                engine.forget_adapter(each.digest)
        try:
            await until(lambda: engine.stats.kv_blocks_used == 0)
        except TimeoutError:
            raise ChurnError(f"blocks are held: {engine.stats}") from None
        stats = engine.stats
        left = {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "adapters": len(engine.adapter_tiers()),
            "bytes of adapters": engine.residency_stats.resident_bytes,
            **held(),
        }
        if any(left.values()):
            raise ChurnError(f"left when all had ended: {left}")

    async def _check_slots(self) -> None:
        """As many adapters as there are slots can still have one each, at the same time."""
        records = [self.store.resolve(task_name(index)) for index in range(NUM_TASKS)]
        by_digest = {record.digest: record for record in records if record.method.value == "lora"}
        chosen = list(by_digest.values())[:NUM_SLOTS]
        await asyncio.gather(*(self._read_from(record) for record in chosen))

    async def _read_from(self, record: AdapterRecord) -> None:
        request = Request(id="slot", prompt_token_ids=(5, 6, 7), adapter=record)
        async for _ in self.engine.generate(request):
            pass


async def _first(stream: AsyncIterator[StepOutput], count: int) -> AsyncIterator[StepOutput]:
    for _ in range(count):
        try:
            yield await anext(stream)
        except StopAsyncIteration:
            return


def task_name(index: int) -> str:
    """Of one of the tasks."""
    return f"task{index:02}"
