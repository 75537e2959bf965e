"""Sending answers: waits for callers to read them, within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from manyhats.engine.errors import FieldInvalidError, StreamUnreadError
from manyhats.server.service.errors import UnreadAnswersError

MAX_ANSWER_BYTES = 256 * 1024 * 1024  # prompt_logprobs with 100 alternatives on a long prompt
# Smaller ones are bounded by the number of calls.
_COUNTED_FROM_BYTES = 64 * 1024


class Answers:
    """Sends messages, and knows how much of them is still unread.

    Args:
        unread_limit_s: a message that waits this long for its caller is abandoned.
        max_bytes: of one message, and of all large ones together that wait for their callers.
    """

    def __init__(self, *, unread_limit_s: float, max_bytes: int) -> None:
        self._unread_limit_s = unread_limit_s
        self._max_bytes = max_bytes
        self._num_unread_bytes = 0

    async def send(self, data: bytes, context: Any, *, is_first: bool = True) -> None:
        """Send a message in wire format; waits while the caller does not read, but not forever.

        Raises:
            FieldInvalidError: it has more bytes than an answer may have.
            UnreadAnswersError: too much is already waiting to be read.
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
                    # Sent separately: if the first message were abandoned, gRPC would not know that this was sent, and
                    # would send no status.
                    await context.send_initial_metadata(())
                await context.write(data)
        except TimeoutError:
            is_given_up = limit.expired()
            if not is_given_up:
                raise
            # gRPC keeps its copy until the caller reads it or leaves: only then does the call end.
            context.add_done_callback(lambda _: self._uncount(num_counted))
            del data
            raise StreamUnreadError(self._unread_limit_s) from None
        except grpc.aio.InternalError as error:  # the caller has left; the call is about to be cancelled
            raise asyncio.CancelledError from error
        finally:
            if not is_given_up:
                self._uncount(num_counted)

    def _uncount(self, num_bytes: int) -> None:
        self._num_unread_bytes -= num_bytes
