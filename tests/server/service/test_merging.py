"""Several streams as one: order, errors, closing, and a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from manyhats.server.service.merging import each_of, merged


class Source:
    """A stream of numbers; knows how far it was read, and whether it was closed."""

    def __init__(self, count: int, *, wait_s: float = 0.0, error: Exception | None = None) -> None:
        self.num_given = 0
        self.is_closed = False
        self._count, self._wait_s, self._error = count, wait_s, error

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._count):
                await asyncio.sleep(self._wait_s)
                self.num_given += 1
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.is_closed = True


async def test_all_items_come_each_stream_in_its_order() -> None:
    sources = [Source(5), Source(0), Source(3, wait_s=0.001), Source(50)]
    found = [each async for each in merged([source.items() for source in sources])]
    for index, source in enumerate(sources):
        assert [number for at, number in found if at == index] == list(range(source.num_given))
    assert [source.num_given for source in sources] == [5, 0, 3, 50]


async def test_no_stream_waits_for_a_slow_one() -> None:
    slow, fast = Source(1, wait_s=60), Source(3)
    async with aclosing(merged([slow.items(), fast.items()])) as items:
        assert [await anext(items) for _ in range(3)] == [(1, 0), (1, 1), (1, 2)]
    assert (slow.is_closed, fast.is_closed) == (True, True)


async def test_an_error_ends_all() -> None:
    error = ValueError("mine")
    sources = [Source(2, error=error), Source(1000, wait_s=60), Source(10**9)]
    with pytest.raises(ValueError, match="mine") as caught:
        async for _ in merged([source.items() for source in sources]):
            pass
    assert caught.value is error
    assert all(source.is_closed for source in sources)


async def test_a_reader_that_leaves_closes_all() -> None:
    sources = [Source(1000, wait_s=60), Source(10**9)]

    async def read() -> None:
        async with aclosing(merged([source.items() for source in sources])) as items:
            async for _ in items:
                pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()
    assert all(source.is_closed for source in sources)


async def test_a_slow_reader_slows_the_streams_down() -> None:
    sources = [Source(1000), Source(1000)]
    async with aclosing(merged([source.items() for source in sources])) as items:
        for number in range(1, 20):
            await anext(items)
            await asyncio.sleep(0.001)
            assert sum(source.num_given for source in sources) <= number + 3


async def test_no_more_streams_run_than_may() -> None:
    running = 0
    most = 0

    async def counted(number: int) -> AsyncGenerator[int, None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
            yield number
        running -= 1

    found = [each async for each in merged([counted(number) for number in range(6)], at_once=2)]
    assert most == 2
    assert sorted(found) == sorted((number, number) for number in range(6) for _ in range(3))


async def test_answers_come_in_order_so_many_at_a_time() -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.001 * (number % 3))
        running -= 1
        return number * number

    assert await each_of(work, 20, at_once=4) == [number * number for number in range(20)]
    assert most == 4


async def test_an_error_of_one_answer_ends_the_others() -> None:
    begun: list[int] = []

    async def work(number: int) -> None:
        begun.append(number)
        await asyncio.sleep(60 if number != 2 else 0.001)
        raise ValueError(str(number))

    with pytest.raises(ValueError, match="2"):
        await each_of(work, 100, at_once=5)
    assert len(begun) <= 6
