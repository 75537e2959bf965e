"""Receives an upload: the header, then chunks, no faster than they can be written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from manyhats.adapters.registration import Registered, Registration
from manyhats.server.service.errors import UploadStalledError
from manyhats.server.service.registrations import Registrations

if TYPE_CHECKING:
    from manyhats.adapters.store.upload import UploadSession

_STALL_LIMIT_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a file; ``new_file`` is the name of one that begins with it and was not announced."""

    file_index: int
    offset: int
    data: bytes
    new_file: str = ""


class Upload(Protocol):
    """What a caller sends, as it arrives."""

    async def header(self) -> Registration:
        """The registration; called once, and first.

        Raises:
            FieldInvalidError: something else arrived.
            AdapterError: a value is out of range.
        """
        ...

    async def chunk(self) -> Chunk | None:
        """The next piece; None at the end.

        Raises:
            FieldInvalidError: something else arrived.
        """
        ...


async def take_upload(
    upload: Upload,
    registrations: Registrations,
    accept: Callable[[], Awaitable[None]],
    *,
    stall_limit_s: float = _STALL_LIMIT_S,
) -> Registered:
    """Make a version from the files that arrive. However it ends, nothing else of them is left.

    One piece is in memory at a time: the next is read once the previous one is written, so the caller is slowed down to
    the disk's speed.

    Args:
        upload: what the caller sends.
        registrations: opens the upload and finishes it.
        accept: tells the caller that the header is accepted.
        stall_limit_s: how long to wait for a piece.

    Raises:
        FieldInvalidError: what arrived is not what is expected there.
        UploadStalledError: nothing arrived for too long.
        AdapterError: the files are refused.
    """
    with registrations.counted_failures():
        registration = await _within(stall_limit_s, upload.header())
        opening = asyncio.ensure_future(registrations.open_upload(registration))
    try:
        with registrations.counted_failures():
            session = await asyncio.shield(opening)
            await accept()
            await _take_chunks(upload, registrations, session, stall_limit_s)
        return await registrations.finish_upload(session, registration)
    finally:
        await asyncio.shield(_end(opening, registrations))


async def _take_chunks(
    upload: Upload, registrations: Registrations, session: UploadSession, stall_limit_s: float
) -> None:
    while (chunk := await _within(stall_limit_s, upload.chunk())) is not None:
        await registrations.run(partial(_take, session, chunk))


def _take(session: UploadSession, chunk: Chunk) -> None:
    if chunk.new_file:
        session.open_file(chunk.new_file)
    if chunk.data or not chunk.new_file:
        session.write(chunk.file_index, chunk.offset, chunk.data)


async def _within(stall_limit_s: float, arrival: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(stall_limit_s):
            return await arrival
    except TimeoutError:
        raise UploadStalledError(stall_limit_s) from None


async def _end(opening: asyncio.Future[UploadSession], registrations: Registrations) -> None:
    """Remove what is left of an upload, even of one abandoned while being opened."""
    with suppress(Exception):  # the caller was told
        session = await opening
        await registrations.abort_upload(session)
