"""AdapterService: registers, takes uploads, describes, lists, activates, pins and deletes adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.registration import Registration
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.grpc import from_proto, to_proto
from manyhats.server.grpc.interceptor import GrpcCall
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.call import Call
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import Registrations, visible_page
from manyhats.server.service.uploads import Chunk, take_upload
from manyhats.v1 import adapter_pb2

# Sent as initial metadata once an upload's header is accepted: the caller may then send chunks.
_ACCEPTED = ("manyhats-upload", "accepted")


class UploadMessages:
    """An upload as its caller's messages: the header, then chunks."""

    def __init__(self, messages: AsyncIterator[adapter_pb2.UploadAdapterRequest]) -> None:
        self._messages = messages

    async def header(self) -> Registration:
        """The registration; see ``Upload``."""
        first = await anext(self._messages, None)
        if first is None or first.WhichOneof("content") != "header":
            raise FieldInvalidError("header", "must come in the first message")
        return from_proto.registration(first.header)

    async def chunk(self) -> Chunk | None:
        """The next piece; see ``Upload``."""
        message = await anext(self._messages, None)
        if message is None:
            return None
        if message.WhichOneof("content") != "chunk":
            raise FieldInvalidError("chunk", "must be in every message but the first")
        return Chunk(message.chunk.file_index, message.chunk.offset, message.chunk.data)


class AdapterService:
    """Manages the adapters of the backend behind the gate; lists show what the caller's scope covers."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def RegisterAdapter(  # noqa: N802
        self, request: adapter_pb2.RegisterAdapterRequest, call: Call
    ) -> adapter_pb2.RegisterAdapterResponse:
        """Make an artifact, or several combined, a version of a task."""
        registrations = self._registrations
        with registrations.counted_failures():
            registration = from_proto.registration(request)
        answer = await registrations.register(registration)
        return adapter_pb2.RegisterAdapterResponse(
            adapter=self._message(answer.record), created=answer.created
        )

    async def UploadAdapter(  # noqa: N802
        self, request_iterator: AsyncIterator[adapter_pb2.UploadAdapterRequest], call: GrpcCall
    ) -> adapter_pb2.UploadAdapterResponse:
        """Make uploaded files a version of a task."""

        async def accept() -> None:
            await call.context.send_initial_metadata((_ACCEPTED,))

        answer = await take_upload(UploadMessages(request_iterator), self._registrations, accept)
        return adapter_pb2.UploadAdapterResponse(adapter=self._message(answer.record), created=answer.created)

    async def GetAdapter(  # noqa: N802
        self, request: adapter_pb2.GetAdapterRequest, call: Call
    ) -> adapter_pb2.GetAdapterResponse:
        """Describe one version."""
        record = self._gate.backend.store.get(request.task_id)
        return adapter_pb2.GetAdapterResponse(adapter=self._message(record))

    async def ListAdapters(  # noqa: N802
        self, request: adapter_pb2.ListAdaptersRequest, call: Call
    ) -> adapter_pb2.ListAdaptersResponse:
        """List versions, page by page."""
        page = visible_page(
            self._gate.backend.store,
            call.caller.scope,
            task_id=request.task_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        adapters = self._all_messages(page.records)
        return adapter_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=page.next_page_token)

    async def ActivateAdapter(  # noqa: N802
        self, request: adapter_pb2.ActivateAdapterRequest, call: Call
    ) -> adapter_pb2.ActivateAdapterResponse:
        """Move a task to one of its versions."""
        record = await self._registrations.activate(request.task_id)
        return adapter_pb2.ActivateAdapterResponse(adapter=self._message(record))

    async def PinAdapter(  # noqa: N802
        self, request: adapter_pb2.PinAdapterRequest, call: Call
    ) -> adapter_pb2.PinAdapterResponse:
        """Keep a version in memory."""
        record = await self._registrations.pin(request.task_id)
        return adapter_pb2.PinAdapterResponse(adapter=self._message(record))

    async def UnpinAdapter(  # noqa: N802
        self, request: adapter_pb2.UnpinAdapterRequest, call: Call
    ) -> adapter_pb2.UnpinAdapterResponse:
        """Let a version leave memory again."""
        record = await self._registrations.unpin(request.task_id)
        return adapter_pb2.UnpinAdapterResponse(adapter=self._message(record))

    async def DeleteAdapter(  # noqa: N802
        self, request: adapter_pb2.DeleteAdapterRequest, call: Call
    ) -> adapter_pb2.DeleteAdapterResponse:
        """Delete one version or a whole task."""
        gone = await self._registrations.delete(request.task_id, force=request.force)
        return adapter_pb2.DeleteAdapterResponse(adapters=self._all_messages(gone))

    @property
    def _registrations(self) -> Registrations:
        return Registrations(self._gate.backend, self._metrics)

    def _message(self, record: AdapterRecord) -> adapter_pb2.Adapter:
        (message,) = self._all_messages([record])
        return message

    def _all_messages(self, records: Iterable[AdapterRecord]) -> list[adapter_pb2.Adapter]:
        tiers = self._gate.backend.engine.adapter_tiers()
        return [to_proto.adapter(record, tiers.get(record.digest)) for record in records]
