"""AdapterService: registers, takes uploads, describes, lists, activates and deletes adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc

from manyhats.adapters.artifact import AdapterRecord
from manyhats.server.access.tokens import Scope
from manyhats.server.grpc import from_proto, to_proto
from manyhats.server.grpc.uploads import ACCEPTED, take_upload
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import Registrar
from manyhats.server.service.visible_page import visible_page
from manyhats.v1 import adapter_pb2, adapter_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Manages the adapters of the backend behind the gate; lists show what the caller's scope reaches."""

    def __init__(self, gate: Gate, metrics: Metrics, scope_of: Callable[[Context], Scope]) -> None:
        self._gate = gate
        self._metrics = metrics
        self._scope_of = scope_of

    async def RegisterAdapter(  # noqa: N802
        self, request: adapter_pb2.RegisterAdapterRequest, context: Context
    ) -> adapter_pb2.RegisterAdapterResponse:
        """Make an artifact, or several that act together, a version of a task."""
        # Shielded, as every change is: once begun, it is carried through to engine and metrics even if its caller
        # leaves.
        spec = from_proto.registration_spec(request)
        registration = await asyncio.shield(self._registrar.register(spec))
        return adapter_pb2.RegisterAdapterResponse(
            adapter=self._message(registration.record), created=registration.created
        )

    async def UploadAdapter(  # noqa: N802
        self, request_iterator: AsyncIterator[adapter_pb2.UploadAdapterRequest], context: Context
    ) -> adapter_pb2.UploadAdapterResponse:
        """Make the files that a caller sends a version of a task."""

        async def accept() -> None:
            await context.send_initial_metadata((ACCEPTED,))

        registration = await take_upload(request_iterator, self._registrar, accept)
        return adapter_pb2.UploadAdapterResponse(
            adapter=self._message(registration.record), created=registration.created
        )

    async def GetAdapter(  # noqa: N802
        self, request: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        """Describe one version."""
        record = self._gate.backend.store.get(request.task_id)
        return adapter_pb2.GetAdapterResponse(adapter=self._message(record))

    async def ListAdapters(  # noqa: N802
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        """List versions, page by page."""
        page = visible_page(
            self._gate.backend.store,
            self._scope_of(context),
            task_id=request.task_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        adapters = [self._message(record) for record in page.records]
        return adapter_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=page.next_page_token)

    async def ActivateAdapter(  # noqa: N802
        self, request: adapter_pb2.ActivateAdapterRequest, context: Context
    ) -> adapter_pb2.ActivateAdapterResponse:
        """Move a task to one of its versions."""
        record = await asyncio.shield(self._registrar.activate(request.task_id))
        return adapter_pb2.ActivateAdapterResponse(adapter=self._message(record))

    async def DeleteAdapter(  # noqa: N802
        self, request: adapter_pb2.DeleteAdapterRequest, context: Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        """Delete one version or a whole task."""
        gone = await asyncio.shield(self._registrar.delete(request.task_id, force=request.force))
        return adapter_pb2.DeleteAdapterResponse(adapters=[self._message(record) for record in gone])

    @property
    def _registrar(self) -> Registrar:
        return Registrar(self._gate.backend, self._metrics)

    def _message(self, record: AdapterRecord) -> adapter_pb2.Adapter:
        is_resident = record.digest in self._gate.backend.engine.resident_digests()
        return to_proto.adapter(record, is_resident=is_resident)
