"""Where texts are processed, so that long ones hold up neither the event loop nor the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from manyhats.engine.output import TokenOutput

T = TypeVar("T")

# For shorter texts, switching threads would cost more than the tokenizer.
_INLINE_LENGTH = 2048
# About 20 ms of the tokenizer's time.
BRIEF_LENGTH = 16 * 1024
# A message of this size is read and checked in a millisecond or two, whatever it has.
_INLINE_BYTES = 4 * 1024
# As much as Python code does in a tenth of a millisecond or two.
_SLICE_LENGTH = 512
_SLICE_BYTES = 16 * 1024
_PAUSE_S = 0.0002
# The cost of adding a token to an answer: in characters to tokenize, and in tokens to parse.
_ENTRY_LENGTH = 17
ENTRY_WEIGHT = 4
_INLINE_ENTRIES = _INLINE_LENGTH // _ENTRY_LENGTH


@dataclass(frozen=True, slots=True)
class TextThreads:
    """Runs work on texts, by their length.

    Attributes:
        brief: for texts that take milliseconds; None for the event loop's own threads.
        long: for the others. With one thread, any number of callers leave the engine all processors but one.
    """

    brief: Executor | None = None
    long: Executor | None = None

    async def build(self, work: Callable[[], T], count: int) -> T:
        """Return the answer that ``work`` builds of so many tokens; a large one is built off the event loop."""
        return work() if count <= _INLINE_ENTRIES else await self.run(work, _ENTRY_LENGTH * count)

    async def read(self, work: Callable[[], T], num_bytes: int) -> T:
        """Return the result of ``work``, which reads or checks a message of so many bytes, in pieces."""
        if num_bytes <= _INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.brief, work)

    async def run(self, work: Callable[[], T], length: int) -> T:
        """Return the result of ``work``, which takes time in proportion to ``length``, in characters or tokens.

        Work whose caller leaves before it begins is not done.
        """
        if length <= _INLINE_LENGTH:
            return work()
        threads = self.brief if length <= BRIEF_LENGTH else self.long
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def slices(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Consecutive parts of ``values``, with pauses in between, in which others get the interpreter lock at once.

    They would otherwise wait 5 ms each time they need it; the engine needs it several times per step.
    """
    for begin in range(0, len(values), _SLICE_LENGTH):
        if begin:
            time.sleep(_PAUSE_S)
        yield values[begin : begin + _SLICE_LENGTH]


def byte_slices(text: bytes) -> Iterator[bytes]:
    """``slices`` of a text that is scanned by functions of the standard library's C code."""
    for begin in range(0, len(text), _SLICE_BYTES):
        if begin:
            time.sleep(_PAUSE_S)
        yield text[begin : begin + _SLICE_BYTES]


def num_entries(tokens: Iterable[TokenOutput]) -> int:
    """How many tokens an answer of these has, including the most likely ones at each position."""
    return sum(1 + len(token.top) for token in tokens)


def paced_tokens(tokens: Iterable[TokenOutput]) -> Iterator[TokenOutput]:
    """Tokens one by one, to be added to an answer with what was requested besides them, with pauses in between."""
    if isinstance(tokens, tuple) and len(tokens) <= 1:  # of a stream, which need none
        return iter(tokens)
    return paced(tokens, lambda each: ENTRY_WEIGHT * (1 + len(each.top)))


def paced(values: Iterable[T], weight: Callable[[T], int]) -> Iterator[T]:
    """``values`` one by one, with such a pause after each slice's worth of weight."""
    since = 0
    for value in values:
        if since >= _SLICE_LENGTH:
            time.sleep(_PAUSE_S)
            since = 0
        since += weight(value)
        yield value
