"""Very many requests on a real engine and a real store, each ended in its own way, and nothing left of any.

``make churn`` (``CHURN_REQUESTS=100000``), or ``python -m churn`` in ``tests``. Callers leave, give up, stop reading,
come with deadlines that have passed or soon will; versions are registered and deleted under them; memory and slots for
adapters and blocks for keys and values are far too few. Every request must have exactly one end. Afterwards no block is
held, no lease, slot, thread or file, and the process is no larger than it was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import (
    DeadlineExceededError,
    QueueFullError,
    StreamUnreadError,
)
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.job import Event
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.loop.streams import Stream
from manyhats.engine.output import StepOutput
from manyhats.engine.request import Request, ScoreRequest, SpeculationParams, StoppingParams
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.sequence import Sequence
from restart_under_load import check_files
from support.factories.adapters import make_ia3, make_lora
from support.factories.prefixes import make_prefix, make_prompt
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import load_tiny, random_ids, running_engine, until

NUM_TASKS = 12
NUM_CALLERS = 48
NUM_SLOTS = 4
MAX_GROWTH_BYTES = 48 << 20
REFUSED = (QueueFullError, DeadlineExceededError, StreamUnreadError)
HELD = (Sequence, Generation, Scoring, Stream, Lease)
"""What lives as long as a request."""


class ChurnError(Exception):
    """Something is left, or a request had no end or several."""


@dataclass(slots=True)
class Ends:
    """How requests ended, as their callers saw it and as the engine's thread told it.

    Attributes:
        seen: by callers.
        told: last events of each job, and events that came after the last.
    """

    seen: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)

    def watch(self, engine: Engine) -> None:
        """See every event on its way to its stream."""
        streams: Any = engine.loop.streams
        publish: Callable[[list[Event]], bool] = streams.publish
        over: set[str] = set()

        def watched(events: list[Event]) -> bool:
            for event in events:
                self.told["after the end"] += event.job_id in over
                if event.is_last:
                    over.add(event.job_id)
                    self.told["ends"] += 1
            return publish(events)

        streams.publish = watched


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

    async def _caller(self, left: Any) -> None:
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
        return self.store.resolve(_task(min(int(self._rng.expovariate(0.35)), NUM_TASKS - 1)))

    def _deadline_s(self) -> float | None:
        if self._rng.random() < 0.7:
            return None
        return time.monotonic() + self._rng.choice([-0.01, 0.0, 0.002, 0.02, 0.2])

    # Changes of versions

    async def _change_versions(self) -> None:
        """Move, replace and delete versions, as ``Registrations`` does, and load some ahead."""
        while True:
            await asyncio.sleep(self._rng.uniform(0.0, 0.1))
            task = _task(self._rng.randrange(NUM_TASKS))
            source = self._rng.choice(self._sources)
            registered = await asyncio.to_thread(self.store.register, Registration(task, Uri(str(source))))
            versions = self.store.versions(task)
            if len(versions) > 2:
                old = self._rng.choice([each for each in versions if each.name != registered.record.name])
                for each in self.store.delete(old.name, in_use=self.engine.in_use, force=True):
                    if not self.store.has_digest(each.digest):
                        self.engine.forget_adapter(each.digest)
            if self._rng.random() < 0.3:
                with contextlib.suppress(AdapterError):
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
        for task in map(_task, range(NUM_TASKS)):
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
            **_held(),
        }
        if any(left.values()):
            raise ChurnError(f"left when all had ended: {left}")

    async def _check_slots(self) -> None:
        """As many adapters as there are slots can still have one each, at the same time."""
        records = [self.store.resolve(_task(index)) for index in range(NUM_TASKS)]
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


def _held() -> dict[str, int]:
    gc.collect()
    counts = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in HELD)
    return dict(counts)


def _task(index: int) -> str:
    return f"task{index:02}"


def make_sources(root: Path, base: BaseDescription) -> tuple[list[Path], int]:
    """Adapters of several methods, and the bytes of the largest."""
    made = [
        *(make_lora(root / f"lora{seed}", base, seed=seed) for seed in range(8)),
        *(make_ia3(root / f"ia3-{seed}", base, seed=seed) for seed in range(3)),
        make_prefix(root / "prefix", base),
        make_prompt(root / "prompt", base, num_virtual_tokens=20),
    ]
    return made, max(path.stat().st_size for path in root.rglob("*.safetensors"))


async def churn(model: LoadedModel, root: Path, num_requests: int, seed: int) -> str:
    """Ask so many times.

    Args:
        model: tiny.
        root: an empty directory.
        num_requests: of all callers.
        seed: of everything but what threads do.

    Returns:
        What happened, in words.

    Raises:
        ChurnError: something is left, or a request did not end once.
    """
    sources, size = make_sources(root / "sources", model.description)
    store = open_store(root / "store", model.description, [root / "sources"])
    process = psutil.Process()
    rss_bytes: list[int] = []
    for index in range(NUM_TASKS):
        store.register(Registration(_task(index), Uri(str(sources[index]))))
    num_threads, num_files = threading.active_count(), process.num_fds()
    async with running_engine(
        model,
        store.lower,
        max_num_sequences=12,
        max_num_batched_tokens=64,
        max_waiting=40,
        max_loaded_adapters=NUM_SLOTS,
        max_adapter_bytes=6 * size,
        kv_cache_bytes=1 << 18,
        unread_limit_s=0.3,
        max_unread_outputs=8,
    ) as engine:
        churn = Churn(engine, store, sources, seed)
        await churn.run(num_requests, lambda: rss_bytes.append(process.memory_info().rss))
        await churn.check_idle()
        residency = engine.residency_stats
    if churn.ends.seen.total() != num_requests:
        raise ChurnError(f"of {num_requests} requests {churn.ends.seen.total()} have ended")
    store.close()
    check_files(root / "store", 0)
    _check_process(process, num_threads, num_files, rss_bytes)
    seen = ", ".join(f"{count} {name}" for name, count in churn.ends.seen.most_common())
    return (
        f"{num_requests} requests: {seen}; {residency.num_loads} loads, {residency.num_evictions} evictions from "
        f"memory and {residency.num_slot_evictions} from slots, {churn.num_changes} changes of versions; at most "
        f"{max(rss_bytes):,} bytes; nothing left"
    )


def _check_process(process: psutil.Process, num_threads: int, num_files: int, rss_bytes: list[int]) -> None:
    """Check that threads, files and memory are what they were.

    Raises:
        ChurnError: there are more.
    """
    end_s = time.monotonic() + 20.0
    while (
        threading.active_count() > num_threads + 1 and time.monotonic() < end_s
    ):  # asyncio's own worker threads
        time.sleep(0.1)
    names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio")]
    if len(names) > num_threads:
        raise ChurnError(f"threads are left: {names}")
    if process.num_fds() > num_files:
        raise ChurnError(f"{process.num_fds()} files are open instead of {num_files}")
    third = max(1, len(rss_bytes) // 3)
    if max(rss_bytes[-third:]) > max(rss_bytes[:third]) + MAX_GROWTH_BYTES:
        raise ChurnError(f"more and more memory is held: {rss_bytes[::third]}")


def main() -> None:
    """Print what happened."""
    parser = argparse.ArgumentParser(prog="python -m churn", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if not given")
    options = parser.parse_args()
    seed = random.randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="churn-") as name:
        root = Path(name)
        model = load_tiny(make_checkpoint(root / "model"))
        print(asyncio.run(churn(model, root, options.requests, seed)))


if __name__ == "__main__":
    main()
