"""Work that its caller may leave."""

from __future__ import annotations

import asyncio
import gc

import pytest

from manyhats.engine.threads.awaiting import outlived


async def fails(when: asyncio.Event) -> None:
    await when.wait()
    raise ValueError("torn")


async def test_work_goes_on_when_its_caller_leaves_and_its_result_is_there_for_others() -> None:
    work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    leaves, stays = (asyncio.create_task(outlived(work)) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    work.set_result(7)
    assert await stays == 7


async def test_an_error_goes_to_who_waits() -> None:
    when = asyncio.Event()
    when.set()
    with pytest.raises(ValueError, match="torn"):
        await outlived(fails(when))


async def test_an_error_that_nobody_waits_for_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()  # what other tests left would be logged here
    caplog.clear()
    when = asyncio.Event()
    caller = asyncio.create_task(outlived(fails(when)))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    when.set()
    await asyncio.sleep(0.01)
    gc.collect()
    assert caplog.text == ""
