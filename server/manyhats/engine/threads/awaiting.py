"""Waiting for work that several callers share, or that a caller may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


async def outlived(work: Awaitable[T]) -> T:
    """The result of work that continues if this caller is cancelled.

    What it then fails with has nobody to go to; asyncio would log it as an error that was never retrieved.
    """
    future = asyncio.ensure_future(work)
    future.add_done_callback(_note)
    return await asyncio.shield(future)


def _note(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
