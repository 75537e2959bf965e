"""How much of a port's answers its callers have not read yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from manyhats.engine.errors import FieldInvalidError, StreamUnreadError
from manyhats.server.service.errors import UnreadAnswersError

MAX_ANSWER_BYTES = 256 * 1024 * 1024  # prompt_logprobs with 100 alternatives on a long prompt
# Smaller ones are bounded by the number of calls.
_COUNTED_FROM_BYTES = 64 * 1024


class Answers:
    """Bounds the time and the memory that unread answers take.

    Args:
        unread_limit_s: a piece of an answer that waits this long for its caller is abandoned.
        max_bytes: of one piece, and of all large ones together that wait for their callers.
    """

    def __init__(self, *, unread_limit_s: float, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self.max_bytes = max_bytes
        self.unread_limit_s = unread_limit_s
        self._num_unread_bytes = 0

    def answer(self, once_dropped: Callable[[Callable[[], None]], object]) -> Answer:
        """One answer, to be closed at its end.

        Args:
            once_dropped: calls its argument once the transport no longer keeps a piece that was abandoned.
        """
        return Answer(self, once_dropped)

    def count(self, num_bytes: int) -> int:
        """Count a piece that waits to be read; returns how many of its bytes are counted, for ``uncount``.

        Raises:
            FieldInvalidError: it has more bytes than an answer may have.
            UnreadAnswersError: too much is already waiting to be read.
        """
        if num_bytes <= _COUNTED_FROM_BYTES and num_bytes <= self.max_bytes:
            return 0
        if num_bytes > self.max_bytes:
            raise FieldInvalidError(
                "request", f"its answer has {num_bytes} bytes; the limit is {self.max_bytes}"
            )
        if self._num_unread_bytes + num_bytes > self.max_bytes:
            raise UnreadAnswersError(self.max_bytes)
        self._num_unread_bytes += num_bytes
        return num_bytes

    def uncount(self, num_bytes: int) -> None:
        """Count a piece no longer."""
        self._num_unread_bytes -= num_bytes


class Answer:
    """One answer, sent in pieces, one at a time.

    A timer for each piece would cost more than sending it. One timer watches the answer, and looks when it goes off for
    how long the piece of that moment has been waiting.
    """

    def __init__(self, answers: Answers, once_dropped: Callable[[Callable[[], None]], object]) -> None:
        self._answers = answers
        self._once_dropped = once_dropped
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._num_counted = 0
        self._since_s = 0.0
        self._task: asyncio.Task[Any] | None = None  # that sends a piece now
        self._num_cancels = 0  # of that task, before
        self._is_given_up = False

    def sending(self, num_bytes: int) -> Self:
        """Surround the sending of a piece, which may wait while the caller does not read, but not forever.

        Raises:
            FieldInvalidError: it has more bytes than an answer may have.
            UnreadAnswersError: too much is already waiting to be read.
            StreamUnreadError: the caller did not read; as it ends.
        """
        self._num_counted = self._answers.count(num_bytes)
        return self

    def __enter__(self) -> Self:
        self._since_s = self._loop.time()
        self._task = task = asyncio.current_task()
        assert task is not None, "an answer is sent by a task"
        self._num_cancels = task.cancelling()
        if self._timer is None:
            self._timer = self._loop.call_later(self._answers.unread_limit_s, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        num_counted = self._num_counted
        if self._is_given_up:
            self._is_given_up = False
            assert task is not None
            if task.uncancel() <= self._num_cancels and kind is asyncio.CancelledError:
                self._once_dropped(lambda: self._answers.uncount(num_counted))
                raise StreamUnreadError(self._answers.unread_limit_s) from None
        if num_counted:
            self._answers.uncount(num_counted)

    def close(self) -> None:
        """End it: there are no more pieces."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Give a piece up that has waited for long enough, or look again when the present one may have."""
        self._timer = None
        if self._task is None:
            return  # the next piece has it looked after again
        end_s = self._since_s + self._answers.unread_limit_s
        if self._loop.time() < end_s:
            self._timer = self._loop.call_at(end_s, self._look)
            return
        self._is_given_up = True
        self._task.cancel()
