"""Many more tasks than fit in memory: all cold at once, by Zipf's law, beside streams, and one after the other."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

from benchmarks.many_tasks import task_name
from benchmarks.measure import Measurement, percentile
from benchmarks.workload import Workload
from manyhats.client import AsyncClient, Client
from manyhats.load.run import OK, Answer, ask
from manyhats.load.workload import Arrival, arrivals
from manyhats.load.workload import Workload as Load

_NUM_STREAMS = 8
_STREAM_TOKENS = 400
_BRIEF = Load(prompt_tokens=(32, 32), answer_tokens=(8, 8), duration_s=3600.0)
"""Requests of which only the first token counts."""
_SEGMENTS = 2
"""Times that warm and cold requests come beside the streams, in turn."""
_TIERS = ("device", "host", "disk")


def fill_with_copies(store: Path, num_tasks: int) -> None:
    """Give a store's one task, ``task_name(0)``, others of the same weights in files of their own.

    So each has its own bytes on disk and in memory, as adapters of different weights have.
    """
    # Imported where it is used: the client's processes have no need of it, nor of torch.
    from manyhats.adapters.disk.digest import artifact_digest
    from manyhats.adapters.limits import AdapterLimits, Quotas
    from manyhats.adapters.registration import Registration, Uri
    from manyhats.adapters.store.catalogue.catalogue import Catalogue
    from manyhats.adapters.store.opening import open_artifacts

    artifacts = open_artifacts(store, AdapterLimits())
    catalogue = Catalogue(f"sqlite:///{store / 'catalogue.db'}")
    (first,) = catalogue.versions(task_name(0))
    files = artifacts.read(first.digest)
    config = json.loads(files["adapter_config.json"])
    for index in range(1, num_tasks):
        own: dict[str, bytes | bytearray] = {
            **files,
            "adapter_config.json": json.dumps({**config, "revision": str(index)}).encode(),
        }
        digest = artifact_digest(own)
        artifacts.publish(digest, own)
        parts = (replace(first.parts[0], digest=digest),)
        record = replace(first, task_id=task_name(index), digest=digest, parts=parts)
        catalogue.add(record, Registration(record.task_id, Uri(record.source)), Quotas())
    catalogue.close()


class TiersSession:
    """Lives in a worker process; imports nothing of the engine."""

    def __init__(self, workload: Workload, target: str) -> None:
        self._settings = workload.settings
        self._target = target
        self._seed = 0

    def register(self, path: Path) -> None:
        """Makes an adapter the first of the tasks."""
        with Client(self._target) as client:
            client.register_adapter(task_name(0), str(path))

    def all_at_once(self) -> Measurement:
        """A request for each of many tasks at the same moment; none may be in memory."""
        return asyncio.run(self._all_at_once())

    def by_popularity(self, num_tasks: int) -> Measurement:
        """Requests for tasks by Zipf's law, the next when one has ended; a third of them before it counts."""
        return asyncio.run(self._by_popularity(num_tasks))

    def beside_streams(self) -> Measurement:
        """Streams, and a request a second: for a task that is loaded, then for one that is not, in turn."""
        return asyncio.run(self._beside_streams())

    def one_by_one(self) -> Measurement:
        """Times to first token of an idle server, by where the task's adapter is."""
        return asyncio.run(self._one_by_one())

    async def _all_at_once(self) -> Measurement:
        tasks = [task_name(index) for index in range(self._settings.cold_at_once)]
        load = replace(_BRIEF, popularity="cold")
        async with AsyncClient(self._target) as client:
            await client.server_info()  # connects
            began_s = time.perf_counter()
            asked = self._requests(load, tasks, len(tasks))
            answers = await asyncio.gather(*(_answer(client, each, began_s) for each in asked))
        first_s = sorted(answer.first_s for answer in answers if answer.outcome == OK)
        return Measurement(
            {
                "answered": len(first_s),
                "first_median_ms": 1000 * median(first_s),
                "first_last_ms": 1000 * first_s[-1],
                "last_over_linear": first_s[-1] / (2 * median(first_s)),
            },
            {"first": first_s},
        )

    async def _by_popularity(self, num_tasks: int) -> Measurement:
        settings = self._settings
        tasks = [task_name(index) for index in range(num_tasks)]
        load = Load(popularity="zipf", duration_s=3600.0)
        waiting = self._requests(load, tasks, settings.zipf_requests)
        answers: list[Answer] = []
        began_s = time.perf_counter()

        async def caller(client: AsyncClient) -> None:
            for each in waiting:
                answers.append(await _answer(client, each, began_s))

        async with AsyncClient(self._target) as client:
            await asyncio.gather(*(caller(client) for _ in range(settings.zipf_callers)))
        if any(answer.outcome != OK for answer in answers):
            raise RuntimeError("a request failed")
        # From the end of the first third to the last beginning of a request: all callers are busy.
        pieces = sorted(at_s for answer in answers for at_s in answer.pieces_s)
        from_s = sorted(answer.ended_s for answer in answers)[settings.zipf_requests // 3]
        to_s = max(answer.due_s for answer in answers)
        num_tokens = sum(from_s < at_s <= to_s for at_s in pieces)
        return Measurement({"tokens_per_s": num_tokens / (to_s - from_s)})

    async def _beside_streams(self) -> Measurement:
        gaps_s: defaultdict[str, list[float]] = defaultdict(list)
        async with AsyncClient(self._target) as client:
            warm = [task_name(index) for index in range(_NUM_STREAMS + 1)]
            for each in self._requests(replace(_BRIEF, popularity="cold"), warm, len(warm)):
                await _answer(client, each, time.perf_counter())
            for _ in range(_SEGMENTS):
                for which in ("warm", "cold"):
                    count = self._settings.beside_requests
                    tasks = [warm[-1]] if which == "warm" else (await _where(client))["disk"][:count]
                    async with self._streams(client, warm[:-1]) as streams:
                        for each in self._requests(replace(_BRIEF, popularity="cold"), tasks, count):
                            await asyncio.gather(
                                _answer(client, each, time.perf_counter()), asyncio.sleep(1.0)
                            )
                    gaps_s[which] += [gap for answer in streams for gap in answer.gaps_s]
        figures = {f"{which}_p99_ms": 1000 * percentile(gaps, 99) for which, gaps in gaps_s.items()}
        figures |= {f"{which}_median_ms": 1000 * median(gaps) for which, gaps in gaps_s.items()}
        return Measurement(figures, dict(gaps_s))

    async def _one_by_one(self) -> Measurement:
        first_s: dict[str, list[float]] = {tier: [] for tier in _TIERS}
        async with AsyncClient(self._target) as client:
            for index in range(self._settings.cold_starts):
                for tier in _TIERS:
                    tasks = (await _where(client))[tier]
                    (asked,) = self._requests(_BRIEF, [tasks[index % len(tasks)]], 1)
                    answer = await _answer(client, asked, time.perf_counter())
                    first_s[tier].append(answer.first_s)
        return Measurement({f"{tier}_ms": 1000 * median(each) for tier, each in first_s.items()}, first_s)

    @asynccontextmanager
    async def _streams(self, client: AsyncClient, tasks: Sequence[str]) -> AsyncIterator[list[Answer]]:
        """Streams of these tasks while this is entered; afterwards what came of them."""
        answers: list[Answer] = []
        stopping = asyncio.Event()
        load = Load(prompt_tokens=(32, 32), answer_tokens=(_STREAM_TOKENS, _STREAM_TOKENS), duration_s=3600.0)

        async def stream(task: str) -> None:
            for each in self._requests(load, [task], 1000):
                if stopping.is_set():
                    return
                answer = Answer(task, 0.0)
                answers.append(answer)
                await ask(client, each, answer, time.perf_counter(), None)

        running = [asyncio.create_task(stream(task)) for task in tasks]
        while sum(len(answer.pieces_s) > 1 for answer in answers) < len(tasks):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        num_before = [len(answer.pieces_s) for answer in answers]
        yield answers
        stopping.set()
        for each in running:  # which the client may tell of as an error of the call
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for answer, count in zip(answers, num_before, strict=False):
            del answer.pieces_s[:count]

    def _requests(self, load: Load, tasks: Sequence[str], count: int) -> Iterator[Arrival]:
        """The first requests of a load, each time of another one: no prompt comes twice."""
        self._seed += 1
        return islice(arrivals(replace(load, seed=self._seed, rate=1000.0), tasks), count)


async def _answer(client: AsyncClient, asked: Arrival, began_s: float) -> Answer:
    answer = Answer(asked.task, time.perf_counter() - began_s)
    await ask(client, asked, answer, began_s, None)
    return answer


async def _where(client: AsyncClient) -> dict[str, list[str]]:
    """Residency → tasks."""
    found: dict[str, list[str]] = {tier: [] for tier in _TIERS}
    async for info in client.list_adapters(page_size=1000):
        found[info.residency].append(info.task_id)
    return found
