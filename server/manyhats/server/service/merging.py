"""Several streams as one, and several answers at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ended:
    """A stream's end, and the error that it ended with."""

    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    index: int
    item: T


async def merged(
    streams: Sequence[AsyncGenerator[T, None]], at_once: int = 2**31
) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all streams as they come, each with its stream's index; read no faster than they are taken.

    An error of one stream ends all with that error; closing this closes all of them.

    Args:
        streams: they begin in this order.
        at_once: how many are read; the others begin as these end.
    """
    places = asyncio.Semaphore(at_once)
    # Each stream is at most one item ahead: whoever bounds what is not read must notice a slow reader.
    arrived: asyncio.Queue[_Item[T] | _Ended] = asyncio.Queue(maxsize=1)
    readers = [
        asyncio.create_task(_read(index, stream, places, arrived)) for index, stream in enumerate(streams)
    ]
    try:
        num_left = len(readers)
        while num_left:
            match await arrived.get():
                case _Item(index, item):
                    yield index, item
                case _Ended(None):
                    num_left -= 1
                case _Ended(error):
                    assert error is not None
                    raise error
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def each_of(work: Callable[[int], Awaitable[T]], count: int, *, at_once: int) -> list[T]:
    """What ``work`` returns for each number below ``count``, so many at a time; an error of one ends all."""
    room = asyncio.Semaphore(at_once)

    async def one(index: int) -> T:
        async with room:
            return await work(index)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index)) for index in range(count)]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _read(
    index: int,
    stream: AsyncGenerator[T, None],
    places: asyncio.Semaphore,
    arrived: asyncio.Queue[_Item[T] | _Ended],
) -> None:
    ended = _Ended()
    try:
        async with places, aclosing(stream):
            async for item in stream:
                await arrived.put(_Item(index, item))
    except Exception as error:  # noqa: BLE001 - whatever it is, the reader of all streams gets it
        ended = _Ended(error)
    await arrived.put(ended)
