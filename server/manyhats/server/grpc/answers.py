"""Sending answers: as long as callers take to read them, within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from manyhats.engine.errors import FieldInvalidError, StreamUnreadError
from manyhats.server.errors import UnreadAnswersError

MAX_ANSWER_BYTES = 256 * 1024 * 1024  # prompt_logprobs with 100 alternatives on a long prompt
# Smaller ones are bounded by the number of calls.
_COUNTED_FROM_BYTES = 64 * 1024


class Answers:
    """Sends messages, and knows how much of them nobody has read yet.

    Args:
        unread_limit_s: a message that waits so long for its caller is given up.
        max_bytes: of one message, and of all the large ones together that wait for their callers.
    """

    def __init__(self, *, unread_limit_s: float, max_bytes: int) -> None:
        self._unread_limit_s = unread_limit_s
        self._max_bytes = max_bytes
        self._num_unread_bytes = 0

    async def send(self, data: bytes, context: Any, *, is_first: bool = True) -> None:
        """Send a message in wire format; waits while the caller does not read, but not for ever.

        Raises:
            FieldInvalidError: it has more bytes than an answer may have.
            UnreadAnswersError: too much is waiting to be read already.
            StreamUnreadError: the caller did not read.
        """
        if len(data) > self._max_bytes:
            raise FieldInvalidError(
                "request", f"its answer has {len(data)} bytes; the limit is {self._max_bytes}"
            )
        num_counted = len(data) if len(data) > _COUNTED_FROM_BYTES else 0
        if num_counted and self._num_unread_bytes + num_counted > self._max_bytes:
            raise UnreadAnswersError(self._max_bytes)
        self._num_unread_bytes += num_counted
        is_given_up = False
        try:
            async with asyncio.timeout(self._unread_limit_s) as limit:
                if is_first:
                    # With the first message, gRPC would not know that it is sent should the message be given up, and
                    # then send no status.
                    await context.send_initial_metadata(())
                await context.write(data)
        except TimeoutError:
            is_given_up = limit.expired()
            if not is_given_up:
                raise
            # gRPC keeps its copy until the caller reads it or goes: only then does the call end.
            context.add_done_callback(lambda _: self._uncount(num_counted))
            del data
            raise StreamUnreadError(self._unread_limit_s) from None
        except grpc.aio.InternalError as error:  # the caller has gone; the call is about to be cancelled
            raise asyncio.CancelledError from error
        finally:
            if not is_given_up:
                self._uncount(num_counted)

    def _uncount(self, num_bytes: int) -> None:
        self._num_unread_bytes -= num_bytes
