"""Sending gRPC's messages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from manyhats.engine.errors import StreamUnreadError
from manyhats.server.service.answers import Answer, Answers


@contextmanager
def answering(answers: Answers, context: Any) -> Iterator[Answer]:
    """One call's answer."""
    # If a message is abandoned, gRPC keeps its copy until the caller reads it or leaves: only then does the call end.
    answer = answers.answer(lambda then: context.add_done_callback(lambda _: then()))
    try:
        yield answer
    finally:
        answer.close()


async def send(answer: Answer, data: bytes, context: Any, *, is_first: bool = True) -> None:
    """Send a message in wire format; waits while the caller does not read, within the limits of ``answer``.

    Raises:
        FieldInvalidError, UnreadAnswersError, StreamUnreadError: see ``Answer``.
    """
    try:
        with answer.sending(len(data)):
            if is_first:
                # Sent separately: if the first message were abandoned, gRPC would not know that this was sent, and
                # would send no status.
                await context.send_initial_metadata(())
            await context.write(data)
    except StreamUnreadError:
        del data
        raise
    except grpc.aio.InternalError as error:  # the caller has left; the call is about to be cancelled
        raise asyncio.CancelledError from error
