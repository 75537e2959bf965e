"""Takes an upload: the header, then chunks, no faster than they can be written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.errors import UploadStalledError
from manyhats.server.grpc import from_proto
from manyhats.server.service.ports import Registration, UploadSession
from manyhats.server.service.registrations import Registrar
from manyhats.v1 import adapter_pb2

# In the initial metadata, once the header is taken: from then on the caller may send chunks.
ACCEPTED = ("manyhats-upload", "accepted")
_STALL_LIMIT_S = 60.0

Messages = AsyncIterator[adapter_pb2.UploadAdapterRequest]


async def take_upload(
    messages: Messages,
    registrar: Registrar,
    accept: Callable[[], Awaitable[None]],
    *,
    stall_limit_s: float = _STALL_LIMIT_S,
) -> Registration:
    """Make a version of the files that arrive. However it ends, nothing else is left of them.

    One message is in memory at a time: the next is read when the one before is written, and so the caller is slowed
    down to the disk's pace.

    Args:
        messages: the header, then chunks.
        registrar: opens the upload and finishes it.
        accept: tells the caller that the header is taken.
        stall_limit_s: how long to wait for a message.

    Raises:
        FieldInvalidError: a message is not what must come there.
        UploadStalledError: none came for too long.
        AdapterError: the files are refused.
    """
    with registrar.counted_failures():
        spec = from_proto.upload_spec(await _header(messages, stall_limit_s))
        opening = asyncio.ensure_future(registrar.open_upload(spec))
    try:
        with registrar.counted_failures():
            session = await asyncio.shield(opening)
            await accept()
            await _take_chunks(messages, registrar, session, stall_limit_s)
        # Shielded: what has begun to be published is carried through to engine and metrics.
        return await asyncio.shield(registrar.finish_upload(session, spec))
    finally:
        await asyncio.shield(_end(opening, registrar))


async def _header(messages: Messages, stall_limit_s: float) -> adapter_pb2.UploadHeader:
    first = await _next(messages, stall_limit_s)
    if first is None or first.WhichOneof("content") != "header":
        raise FieldInvalidError("header", "must come in the first message")
    return first.header


async def _take_chunks(
    messages: Messages, registrar: Registrar, session: UploadSession, stall_limit_s: float
) -> None:
    while (message := await _next(messages, stall_limit_s)) is not None:
        if message.WhichOneof("content") != "chunk":
            raise FieldInvalidError("chunk", "must be in every message but the first")
        chunk = message.chunk
        await registrar.run(partial(session.write, chunk.file_index, chunk.offset, chunk.data))


async def _next(messages: Messages, stall_limit_s: float) -> adapter_pb2.UploadAdapterRequest | None:
    """The next message; None at the end."""
    try:
        async with asyncio.timeout(stall_limit_s):
            return await anext(messages, None)
    except TimeoutError:
        raise UploadStalledError(stall_limit_s) from None


async def _end(opening: asyncio.Future[UploadSession], registrar: Registrar) -> None:
    """Remove what is left of an upload, even of one that was given up while it was opened."""
    with suppress(Exception):  # it was told to the caller
        session = await opening
        await registrar.run(session.abort)
