"""A request goes to the replica that has its version: by a real Envoy that asks a double of the endpoint picker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from manyhats.v1 import adapter_pb2
from support.fakes.server import Running, running_server
from support.servers.endpoint_picker import EndpointPicker, envoy_config
from support.servers.replicas import Envoy

pytestmark = pytest.mark.deploy


@dataclass(frozen=True)
class Gateway:
    """Two replicas behind Envoy, which asks the picker."""

    one: Running
    two: Running
    picker: EndpointPicker
    http: httpx2.AsyncClient

    async def ask(self, model: str) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        return await self.http.post("/v1/chat/completions", json=body)

    async def goes_to(self, model: str, replica: Running, version: str = "") -> None:
        """Checks where a request goes, and which version answers it."""
        num_before = len(replica.engine.requests)
        answer = await self.ask(model)
        assert answer.status_code == 200, answer.text
        assert self.picker.picked[-1] == (model, replica.http)
        assert len(replica.engine.requests) == num_before + 1
        assert not version or answer.headers["x-manyhats-version"] == version


@asynccontextmanager
async def gateway(directory: Path, *, is_open: bool = True) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(running_server(is_open=is_open)) for _ in range(2)]
        picker = EndpointPicker([one.http, two.http])
        picker_port = await stack.enter_async_context(picker.serving())
        envoy = Envoy(directory, ())
        config = envoy_config(envoy.port, envoy.admin_port, picker_port)
        await stack.enter_async_context(envoy.running_by(config))
        http = httpx2.AsyncClient(base_url=f"http://{envoy.target}", timeout=20)
        yield Gateway(one, two, picker, await stack.enter_async_context(http))


async def register(server: Running, task_id: str, uri: str, *, activate: bool = True) -> None:
    request = adapter_pb2.RegisterAdapterRequest(task_id=task_id, uri=uri, activate=activate)
    await server.adapters.RegisterAdapter(request)


async def test_requests_go_where_their_version_is(tmp_path: Path) -> None:
    async with gateway(tmp_path) as found:
        for server in (found.one, found.two):
            await register(server, "sql", "a")
            await register(server, "sql", "b")
        # One has version 1 alone, which is not active; two has the active one alone.
        del found.one.engine.resident["sha256:b"]
        del found.two.engine.resident["sha256:a"]
        await found.goes_to("sql", found.two, "sql@2")
        await found.goes_to("sql@1", found.one, "sql@1")
        for server in (found.one, found.two):
            await server.adapters.ActivateAdapter(adapter_pb2.ActivateAdapterRequest(task_id="sql@1"))
            server.engine.resident.pop("sha256:a" if server is found.two else "sha256:b", None)
        await found.goes_to("sql", found.one, "sql@1")
        await found.goes_to("sql@2", found.two, "sql@2")


async def test_requests_go_where_there_is_room(tmp_path: Path) -> None:
    async with gateway(tmp_path) as found:
        for server in (found.one, found.two):
            await register(server, "new", "n")
            server.engine.resident.clear()
        for number in range(4):  # as many as run at once
            await register(found.one, f"task{number}", f"u{number}")
        await found.goes_to("new", found.two, "new@1")


async def test_nothing_goes_to_replicas_that_load(tmp_path: Path) -> None:
    async with gateway(tmp_path, is_open=False) as found:
        assert (await found.ask("sql")).status_code == 503
        assert found.picker.picked == []
