"""What a port's answers may leave unread: for how long, and how many bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from manyhats.engine.errors import FieldInvalidError, StreamUnreadError
from manyhats.server.service.answers import Answer, Answers
from manyhats.server.service.errors import UnreadAnswersError

LARGE = 100_000


def answer_of(answers: Answers, dropped: list[Callable[[], None]] | None = None) -> Answer:
    kept: list[Callable[[], None]] = [] if dropped is None else dropped
    return answers.answer(kept.append)


async def send(answer: Answer, num_bytes: int, seconds: float) -> None:
    with answer.sending(num_bytes):
        await asyncio.sleep(seconds)


async def test_a_piece_that_nobody_reads_is_given_up() -> None:
    answer = answer_of(Answers(unread_limit_s=0.05))
    with pytest.raises(StreamUnreadError, match=r"0\.05 s"):
        await send(answer, 10, 60)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_many_pieces_may_take_longer_together_than_one_may() -> None:
    answer = answer_of(Answers(unread_limit_s=0.2))
    for _ in range(10):
        await send(answer, 10, 0.05)
    answer.close()


async def test_time_between_pieces_does_not_count() -> None:
    answer = answer_of(Answers(unread_limit_s=0.1))
    await send(answer, 10, 0)
    await asyncio.sleep(0.15)
    await send(answer, 10, 0.06)
    with pytest.raises(StreamUnreadError):
        await send(answer, 10, 60)


async def test_a_callers_leaving_is_no_unread_answer() -> None:
    sending = asyncio.create_task(send(answer_of(Answers(unread_limit_s=60)), 10, 60))
    await asyncio.sleep(0.01)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_large_pieces_together_are_bounded_until_they_are_read() -> None:
    answers = Answers(unread_limit_s=60, max_bytes=LARGE + 1)
    with pytest.raises(FieldInvalidError, match=f"{LARGE + 2} bytes; the limit is {LARGE + 1}"):
        await send(answer_of(answers), LARGE + 2, 0)
    first = asyncio.create_task(send(answer_of(answers), LARGE, 0.02))
    await asyncio.sleep(0)
    await send(answer_of(answers), 1000, 0)  # small ones are not counted
    with pytest.raises(UnreadAnswersError):
        await send(answer_of(answers), LARGE, 0)
    await first
    await send(answer_of(answers), LARGE, 0)


async def test_an_abandoned_piece_counts_until_its_transport_has_dropped_it() -> None:
    answers, dropped = Answers(unread_limit_s=0.02, max_bytes=LARGE), list[Callable[[], None]]()
    with pytest.raises(StreamUnreadError):
        await send(answer_of(answers, dropped), LARGE, 60)
    with pytest.raises(UnreadAnswersError):
        await send(answer_of(answers), LARGE, 0)
    (drop,) = dropped
    drop()
    await send(answer_of(answers), LARGE, 0)
