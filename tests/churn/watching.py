"""How requests ended, and what is left of them."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from manyhats.engine.engine import Engine
from manyhats.engine.loop.generation import Generation
from manyhats.engine.loop.job import Event
from manyhats.engine.loop.scoring import Scoring
from manyhats.engine.loop.streams import Stream
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.sequence import Sequence

MAX_GROWTH_BYTES = 48 << 20
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
        publish: Callable[..., bool] = streams.publish
        over: set[str] = set()

        def watched(events: list[Event], **options: bool) -> bool:
            for event in events:
                self.told["after the end"] += event.job_id in over
                if event.is_last:
                    over.add(event.job_id)
                    self.told["ends"] += 1
            return publish(events, **options)

        streams.publish = watched


def held() -> dict[str, int]:
    """Objects of ended requests, by type."""
    gc.collect()
    counts = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in HELD)
    return dict(counts)


def check_process(process: psutil.Process, num_threads: int, num_files: int, rss_bytes: list[int]) -> None:
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
