"""Pieces of an answer that a task of its own makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable


async def pieces_of(
    make: Callable[[Callable[[bytes], None]], Awaitable[None]],
) -> AsyncGenerator[bytes, None]:
    """Yield what ``make`` puts, as it does; it is cancelled if this ends first.

    A generator that is left while it waits at its ``yield`` hears of it late or not at all. The task is never there: it
    is cancelled where it waits for its next piece.
    """
    made: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def run() -> None:
        await make(made.put_nowait)

    making = asyncio.create_task(run())
    making.add_done_callback(lambda _: made.put_nowait(None))
    try:
        while (piece := await made.get()) is not None:
            yield piece
        await making
    finally:
        making.cancel()
        await asyncio.wait({making})
