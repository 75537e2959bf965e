"""Where texts are worked on, so that long ones hold up neither the event loop nor the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# For shorter texts the change of threads would cost more than the tokenizer does.
_INLINE_LENGTH = 2048
# Some 20 ms of the tokenizer's time.
BRIEF_LENGTH = 16 * 1024
# What Python code does in a tenth of a millisecond or two.
_SLICE_LENGTH = 512
_PAUSE_S = 0.0002


@dataclass(frozen=True, slots=True)
class TextThreads:
    """Runs work on texts, by their length.

    Attributes:
        brief: for texts that take milliseconds; None are the event loop's own threads.
        long: for the others. With one thread, any number of callers leaves the engine all processors but one.
    """

    brief: Executor | None = None
    long: Executor | None = None

    async def run(self, work: Callable[[], T], length: int) -> T:
        """What ``work`` returns; it takes time in proportion to ``length``, in characters or tokens.

        Work whose caller leaves before it begins is not done.
        """
        if length <= _INLINE_LENGTH:
            return work()
        threads = self.brief if length <= BRIEF_LENGTH else self.long
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def slices(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Consecutive parts of ``values``, with a pause between two: others get the interpreter lock at once.

    They would otherwise wait 5 ms for it, each time they want it; the engine wants it hundreds of times a step.
    """
    for begin in range(0, len(values), _SLICE_LENGTH):
        if begin:
            time.sleep(_PAUSE_S)
        yield values[begin : begin + _SLICE_LENGTH]


def paced(values: Iterable[T], weight: Callable[[T], int]) -> Iterator[T]:
    """``values`` one by one, with such a pause whenever those since the last one weigh as much as a slice is long."""
    since = 0
    for value in values:
        if since >= _SLICE_LENGTH:
            time.sleep(_PAUSE_S)
            since = 0
        since += weight(value)
        yield value
