"""The table of hostile calls, each over a real port: its status, no trace, and a server that goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from hostile.case import STATUS, Call, Case, GateState, World, make_world
from hostile.table import CASES
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2, server_pb2
from support.fakes.server import Running, refused, running_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
Servers = Mapping[GateState, Running]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = make_world(tmp_path_factory.mktemp("world"))
    yield world
    world.store.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(world: World) -> AsyncIterator[Servers]:
    """One server for each state of the gate, which all cases share."""
    async with AsyncExitStack() as stack:
        started = {
            state: await stack.enter_async_context(
                running_server(is_open=state != "loading", store=world.store)
            )
            for state in ("open", "draining", "loading")
        }
        started["draining"].gate.drain()
        yield started


def send(server: Running, call: Call) -> Awaitable[Any]:
    match call:
        case pb.RegisterAdapterRequest():
            return server.adapters.RegisterAdapter(call)
        case pb.GetAdapterRequest():
            return server.adapters.GetAdapter(call)
        case pb.ListAdaptersRequest():
            return server.adapters.ListAdapters(call)
        case pb.ActivateAdapterRequest():
            return server.adapters.ActivateAdapter(call)
        case pb.PinAdapterRequest():
            return server.adapters.PinAdapter(call)
        case pb.DeleteAdapterRequest():
            return server.adapters.DeleteAdapter(call)
        case generation_pb2.GenerateRequest():
            return server.generation.Generate(call)
        case [*messages]:
            return server.adapters.UploadAdapter(sent(messages))
    raise AssertionError(f"no case makes such a call: {call}")


async def sent(messages: Sequence[Any]) -> AsyncIterator[pb.UploadAdapterRequest]:
    for message in messages:
        yield message


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.id for case in CASES])
async def test_hostile_call_has_its_status_and_leaves_no_trace(
    world: World, servers: Servers, number: int, case: Case
) -> None:
    own, server = world.of_case(f"case-{number}"), servers[case.gate]
    call = case.call(own)
    before = own.state()
    server.engine.used = {record.name for record in own.store.list().records if case.in_use}
    with case.during(own):
        refusal = await refused(send(server, call))
    assert (refusal.code, refusal.reason) == STATUS[case.error]
    assert refusal.info.domain == "manyhats"
    assert own.state() == before
    assert server.engine.requests == []
    said = f"{refusal.message} {dict(refusal.info.metadata)}"
    assert str(own.store_directory) not in said
    assert refusal.message.isprintable()
    info = await servers["open"].server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert info.base_model
