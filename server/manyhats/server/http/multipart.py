"""An upload as ``multipart/form-data``, as browsers and curl send it: a field with options, then files (RFC 7578)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manyhats.adapters.registration import Registration, Unannounced
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.adapter_messages import OptionsBody
from manyhats.server.http.body import ByteStream, decoded
from manyhats.server.service.errors import UnsupportedMediaTypeError
from manyhats.server.service.uploads import Chunk

OPTIONS_FIELD = "options"
FILE_FIELD = "file"
_MEDIA_TYPE = "multipart/form-data"
_MAX_OPTIONS_BYTES = 256 * 1024
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class _Begin:
    """A part begins: the name of its field, and of its file if it is one."""

    field: str
    file: str | None


class MultipartUpload:
    """An upload as the parts of a form: ``options`` if there are any, and each file in a part of its own.

    Args:
        task_id: what is uploaded for.
        body: of the request; no more than one of its pieces is in memory.

    Raises:
        UnsupportedMediaTypeError: the body is something else.
    """

    def __init__(self, task_id: str, body: ByteStream) -> None:
        self._task_id = task_id
        self._body = body
        self._parts = _Parts(body.content_type)
        self._begun: _Begin | None = None  # the part that is read
        self._num_files = 0
        self._offset = 0

    async def header(self) -> Registration:
        """The registration; see ``Upload``."""
        options = OptionsBody()
        self._begun = await self._next_part()
        if self._begun is not None and self._begun.file is None:
            options = decoded(await self._options(), OptionsBody)
        if self._begun is None:
            raise FieldInvalidError(FILE_FIELD, "the form has no file")
        return Registration(self._task_id, Unannounced(), **options.options)

    async def chunk(self) -> Chunk | None:
        """The next piece; see ``Upload``. A file's first is empty, and has its name."""
        event: _Begin | bytes | None = self._begun or await self._next()
        self._begun = None
        if event is None:
            return None
        if isinstance(event, bytes):
            self._offset += len(event)
            return Chunk(self._num_files - 1, self._offset - len(event), event)
        if event.file is None:
            raise FieldInvalidError(event.field, f"a form has one field, {OPTIONS_FIELD}, before its files")
        self._num_files += 1
        self._offset = 0
        return Chunk(self._num_files - 1, 0, b"", new_file=event.file)

    async def _options(self) -> bytes:
        """The value of the first field, after which another part begins."""
        assert self._begun is not None
        if self._begun.field != OPTIONS_FIELD:
            raise FieldInvalidError(
                self._begun.field, f"is not a field of this form; there is {OPTIONS_FIELD}"
            )
        value = b""
        while isinstance(event := await self._next(), bytes):
            value += event
            if len(value) > _MAX_OPTIONS_BYTES:
                raise FieldInvalidError(OPTIONS_FIELD, f"must have at most {_MAX_OPTIONS_BYTES} bytes")
        self._begun = event
        return value

    async def _next_part(self) -> _Begin | None:
        event = await self._next()
        assert not isinstance(event, bytes)  # the parser tells of a part before its bytes
        return event

    async def _next(self) -> _Begin | bytes | None:
        while not self._parts.events:
            piece = await self._body.read()
            if not piece:
                self._parts.end()
                return None
            self._parts.write(piece)
        return self._parts.events.popleft()


class _Parts:
    """Turns the bytes of a form into ``events``: the beginnings of parts, and pieces of what they hold."""

    def __init__(self, content_type: str) -> None:
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if media_type.decode("latin-1") != _MEDIA_TYPE or not boundary:
            raise UnsupportedMediaTypeError(content_type[:200], f"{_MEDIA_TYPE} with a boundary")
        self.events: deque[_Begin | bytes] = deque()
        self._has_ended = False
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, begin, end: self._header[0].extend(data[begin:end]),
            "on_header_value": lambda data, begin, end: self._header[1].extend(data[begin:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": lambda data, begin, end: self.events.append(bytes(data[begin:end])),
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise UnsupportedMediaTypeError(
                content_type[:200], f"{_MEDIA_TYPE} with a shorter boundary"
            ) from None

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise FieldInvalidError("body", f"is not {_MEDIA_TYPE}: {error}") from None

    def end(self) -> None:
        """Note that no more bytes come."""
        if not self._has_ended:
            raise FieldInvalidError("body", "ends before the form does")

    def _begin(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        name, value = (bytes(each) for each in self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._disposition = value

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        file = options.get(b"filename")
        field = options.get(b"name", b"").decode("utf-8", "replace")[:_MAX_NAME_BYTES]
        self.events.append(
            _Begin(field, None if file is None else file[:_MAX_NAME_BYTES].decode("utf-8", "replace"))
        )

    def _end(self) -> None:
        self._has_ended = True
