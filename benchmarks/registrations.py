"""Registrations while streams decode: how long they take, and what the streams notice of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from benchmarks.measure import Measurement, percentile
from benchmarks.worker import Worker
from benchmarks.workload import REGISTERED, Case, Settings, Workload
from manyhats.client import AsyncClient, Client

_MAX_NEW_TOKENS = 4096
_POLL_S = 0.01

_WAYS = ("path", "upload")


@dataclass(frozen=True, slots=True)
class Gap:
    """From one token of a stream to the next; on the clock that all processes share."""

    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class StreamsSession:
    """Lives in a worker process: streams that decode in the background."""

    def __init__(self, workload: Workload, target: str) -> None:
        self._workload = workload
        self._target = target
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._stopping = threading.Event()
        self._num_started = 0

    def begin(self, case: Case) -> None:
        """Returns when every stream has a token, so that all of them decode."""
        self._stopping.clear()
        self._num_started = 0
        self._running = asyncio.run_coroutine_threadsafe(self._run(case), self._loop)
        while self._num_started < case.num_sequences:
            if self._running.done():
                self._running.result()
            time.sleep(_POLL_S)

    def end(self) -> list[list[Gap]]:
        """Ends all streams and gives the gaps of each."""
        self._stopping.set()
        return self._running.result()

    async def _run(self, case: Case) -> list[list[Gap]]:
        async with AsyncClient(self._target) as client:
            room = (await client.server_info()).max_context_length - self._workload.settings.prompt_tokens
            num_tokens = min(_MAX_NEW_TOKENS, room)
            prompts = self._workload.prompts(case, 0)
            return await asyncio.gather(*(self._stream(client, prompt, num_tokens) for prompt in prompts))

    async def _stream(self, client: AsyncClient, prompt: list[int], num_tokens: int) -> list[Gap]:
        """Generates until it is stopped, again where the context is full; between two generations is no gap."""
        gaps: list[Gap] = []
        is_first = True
        while not self._stopping.is_set():
            arrived: list[float] = []
            async with client.generate_stream(prompt, max_new_tokens=num_tokens, ignore_eos=True) as stream:
                async for chunk in stream:
                    arrived += [time.perf_counter()] * len(chunk.tokens)
                    self._num_started += is_first
                    is_first = False
                    if self._stopping.is_set():
                        break
            gaps += [Gap(before, after) for before, after in pairwise(arrived)]
        return gaps


class RegisteringSession:
    """Lives in a worker process of its own, so that what it hashes and sends delays no stream's reader."""

    def __init__(self, workload: Workload, target: str) -> None:
        paths = [workload.adapters[adapter] for adapter in REGISTERED]
        self._sources = [
            (f"registered{index}", path)
            for index, path in enumerate(paths[: workload.settings.registrations])
        ]
        self._client = Client(target)
        self._client.server_info()  # connects

    def register(self) -> dict[str, list[float]]:
        """Registers every adapter, by turns from its path and by upload; the seconds until each is active."""
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        for index, (task_id, path) in enumerate(self._sources):
            way = _WAYS[index % len(_WAYS)]
            send = self._client.register_adapter if way == "path" else self._client.upload_adapter
            began_s = time.perf_counter()
            registration = send(task_id, str(path))
            seconds[way].append(time.perf_counter() - began_s)
            if not registration.created or registration.adapter.state != "active":
                raise RuntimeError(f"{task_id} was registered before, or is not active")
        return seconds

    def delete(self) -> None:
        """Deletes them again."""
        for task_id, _ in self._sources:
            self._client.delete_adapter(task_id)


def measure_registrations(
    streams: Worker, registering: Worker, case: Case, settings: Settings
) -> Measurement:
    """Streams by themselves for a while, then beside one registration after the other."""
    streams.call("begin", case)
    time.sleep(settings.undisturbed_s)
    begin_s = time.perf_counter()
    seconds: dict[str, list[float]] = registering.call("register")
    end_s = time.perf_counter()
    gaps: list[list[Gap]] = streams.call("end")
    registering.call("delete")
    # While the last streams are still prefilled, the first ones' gaps are wider, whoever registers.
    joint_s = max(stream[0].begin_s for stream in gaps)
    joint = [[gap for gap in stream if gap.begin_s >= joint_s] for stream in gaps]
    return summarize(joint, begin_s, end_s, seconds)


def summarize(
    streams: Sequence[Sequence[Gap]], begin_s: float, end_s: float, seconds: dict[str, list[float]]
) -> Measurement:
    """What ``measure_registrations`` gives, of gaps by stream and of when registrations ran.

    A gap counts as disturbed if any of it lies between ``begin_s`` and ``end_s``. The largest one is given as a
    multiple of its own stream's median gap.
    """
    alone = [[gap for gap in gaps if gap.end_s <= begin_s] for gaps in streams]
    beside = [[gap for gap in gaps if gap.end_s > begin_s and gap.begin_s < end_s] for gaps in streams]
    medians_s = [median(gap.seconds for gap in gaps) for gaps in streams]
    figures: dict[str, float] = {}
    for when, parts in (("alone", alone), ("beside", beside)):
        figures[f"{when}_p99_ms"] = 1000 * percentile([gap.seconds for gap in _flat(parts)], 99)
        figures[f"{when}_largest_gap"] = max(
            gap.seconds / median_s for gaps, median_s in zip(parts, medians_s, strict=True) for gap in gaps
        )
    figures |= {f"{way}_s": median(values) for way, values in seconds.items()}
    figures["slowest_s"] = max(max(values) for values in seconds.values())
    return Measurement(
        figures,
        {
            "alone": [gap.seconds for gap in _flat(alone)],
            "beside": [gap.seconds for gap in _flat(beside)],
            **seconds,
        },
    )


def _flat(parts: Iterable[Iterable[Gap]]) -> list[Gap]:
    return [gap for part in parts for gap in part]
