"""Makes the call of a case without a server: on the store, behind the gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from hostile.case import Call, GateState
from manyhats.adapters.store.store import AdapterStore
from manyhats.server.grpc import from_proto
from manyhats.server.grpc.adapters import UploadMessages
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import Registrations
from manyhats.server.service.uploads import take_upload
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2
from support.fakes.server import EchoEngine, make_backend

_METRICS = Metrics(max_task_labels=1)


def perform(store: AdapterStore, call: Call, *, gate: GateState, in_use: bool) -> None:
    """What the server does with a message, without the server."""
    with make_gate(store, gate).admitted():
        match call:
            case pb.RegisterAdapterRequest():
                store.register(from_proto.registration(call))
            case pb.GetAdapterRequest():
                store.get(call.task_id)
            case pb.ListAdaptersRequest():
                store.list(task_id=call.task_id, page_size=call.page_size, page_token=call.page_token)
            case pb.ActivateAdapterRequest():
                store.activate(call.task_id)
            case pb.PinAdapterRequest():
                store.set_pin(call.task_id, is_pinned=True)
            case pb.DeleteAdapterRequest():
                store.delete(call.task_id, in_use=lambda record: in_use, force=call.force)
            case generation_pb2.GenerateRequest():
                store.resolve(call.task_id)
            case [*messages]:
                asyncio.run(_upload(store, messages))
            case _:
                raise AssertionError(f"no case makes such a call: {call}")


def make_gate(store: AdapterStore, state: GateState) -> Gate:
    """A gate in that state."""
    gate = Gate(heartbeat_limit_s=60)
    if state != "loading":
        gate.open(make_backend(EchoEngine(), store))
    if state == "draining":
        gate.drain()
    return gate


async def _upload(store: AdapterStore, messages: Sequence[Any]) -> None:
    async def sent() -> AsyncIterator[pb.UploadAdapterRequest]:
        for message in messages:
            yield message

    async def accept() -> None:
        """Nobody waits for it."""

    registrations = Registrations(make_backend(EchoEngine(), store), _METRICS)
    await take_upload(UploadMessages(sent()), registrations, accept)
