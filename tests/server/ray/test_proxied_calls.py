"""Calls that come through proxies of Ray Serve: its part, which is in no need of Ray, on real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from manyhats.client import AsyncClient
from manyhats.engine.errors import QueueFullError
from manyhats.server.grpc.port import SERVICES, HealthFollower
from manyhats.server.ray.calls import ProxiedCalls
from manyhats.server.ray.ingress import MODEL_KEY, add_services, streaming_paths
from manyhats.server.service.answers import Answers
from manyhats.v1 import adapter_pb2, generation_pb2
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.fakes.server import EchoEngine, refusal_of, running_server


class PickledContext:
    """What Serve makes of gRPC's context for a replica; the status is set on gRPC's once a message comes back."""

    def __init__(self, context: Any) -> None:
        self.metadata = list(context.invocation_metadata())
        self.status: dict[str, Any] = {}
        self.peer = context.peer

    def invocation_metadata(self) -> list[Any]:
        return self.metadata

    def code(self) -> Any:
        return self.status.get("set_code")

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status["set_code"] = code

    def set_details(self, details: str) -> None:
        self.status["set_details"] = details

    def set_trailing_metadata(self, metadata: list[Any]) -> None:
        self.status["set_trailing_metadata"] = metadata

    def give_to(self, context: Any) -> None:
        for name, value in self.status.items():
            getattr(context, name)(value)


class Proxy:
    """A gRPC server that calls a replica as Serve's proxies do; in the next ``num_ends`` calls that replica ends."""

    def __init__(self, replica: ProxiedCalls) -> None:
        self.replica = replica
        self.seen: list[dict[str, str]] = []
        self.num_ends = 0
        self.server = grpc.aio.server()
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        add_services(None, self)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        (generic,) = handlers
        generic._method_handlers = {
            path: handler._replace(
                unary_unary=self._one(path), stream_unary=self._one(path), unary_stream=self._several(path)
            )
            for path, handler in generic._method_handlers.items()
        }
        self.server.add_generic_rpc_handlers(handlers)

    def _one(self, path: str) -> Callable[..., Any]:
        async def serve(request: Any, context: Any) -> bytes:
            pickled = self._pickled(context)
            if hasattr(request, "__aiter__"):
                request = Requests(request)
            try:
                self._end_if_told()
                message = await self.replica.answer(path, request, pickled)
            except RuntimeError:
                context.set_code(grpc.StatusCode.INTERNAL)
                return b""
            pickled.give_to(context)
            if not context.code():
                context.set_code(grpc.StatusCode.OK)
            return message.SerializeToString()

        return serve

    def _several(self, path: str) -> Callable[..., Any]:
        async def serve(request: bytes, context: Any) -> AsyncIterator[bytes]:
            pickled = self._pickled(context)
            try:
                self._end_if_told()
                async for message in self.replica.stream(path, request, pickled):
                    pickled.give_to(context)
                    yield message.SerializeToString()
                    self._end_if_told()
                if not context.code():
                    context.set_code(grpc.StatusCode.OK)
            except RuntimeError:
                context.set_code(grpc.StatusCode.INTERNAL)

        return serve

    def _pickled(self, context: Any) -> PickledContext:
        pickled = PickledContext(context)
        self.seen.append(dict(pickled.metadata))
        return pickled

    def _end_if_told(self) -> None:
        if self.num_ends:
            self.num_ends -= 1
            raise RuntimeError


class Requests:
    def __init__(self, requests: Any) -> None:
        self._requests = requests

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._requests)

    def is_cancelled(self) -> bool:
        return False


@asynccontextmanager
async def proxied(limit_s: float = 60.0, **options: Any) -> AsyncIterator[SimpleNamespace]:
    """A replica on fakes behind a proxy."""
    async with running_server(**options) as running:
        health = HealthFollower(running.gate, SERVICES)
        await health.publish()
        answers = Answers(unread_limit_s=60.0)
        proxy = Proxy(ProxiedCalls(running.calls, answers, options.get("tokens"), health, limit_s))
        await proxy.server.start()
        try:
            async with grpc.aio.insecure_channel(proxy.address) as channel:
                yield SimpleNamespace(
                    running=running,
                    proxy=proxy,
                    generation=GenerationServiceStub(channel),
                    adapters=AdapterServiceStub(channel),
                )
        finally:
            await proxy.server.stop(0.0)


def asked(text: str = "abc", num_tokens: int = 3) -> generation_pb2.GenerateRequest:
    stopping = generation_pb2.StoppingParams(max_new_tokens=num_tokens)
    return generation_pb2.GenerateRequest(text=text, stopping=stopping)


def test_no_method_is_named_like_another() -> None:
    paths = streaming_paths()
    assert len({path.rpartition("/")[2] for path in paths}) == len(paths)
    assert [path for path, is_stream in paths.items() if is_stream] == [
        "/manyhats.v1.GenerationService/GenerateStream",
        "/grpc.health.v1.Health/Watch",
    ]


async def test_answers_are_those_of_a_port() -> None:
    async with proxied() as here:
        port = here.running.generation
        assert (await here.generation.Generate(asked())).text == (await port.Generate(asked())).text
        pieces = [piece async for piece in here.generation.GenerateStream(asked())]
        assert len(pieces) == 3
        assert "".join(each.text for each in pieces) == (await port.Generate(asked())).text
        async with AsyncClient(here.proxy.address) as client:
            await client.wait_ready(5)


async def test_statuses_have_their_details_and_streams_no_message_beside_them() -> None:
    async with proxied(engine=EchoEngine(queue_error=QueueFullError(7, 1.5))) as here:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.generation.Generate(asked())
        refusal = refusal_of(caught.value)
        call = here.generation.GenerateStream(asked())
        assert await call.initial_metadata() is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(call))
        for each in (refusal, refusal_of(caught.value)):
            assert (each.code, each.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert (each.retry_s, each.pushback_ms) == (1.5, 1500)


async def test_tasks_are_the_models_to_route_by_whatever_their_version() -> None:
    async with proxied() as here, AsyncClient(here.proxy.address) as client:
        for task in ("sql", "sql@3"):
            with pytest.raises(Exception, match="sql"):
                await client.generate("a", task_id=task)
        assert [each[MODEL_KEY] for each in here.proxy.seen] == ["sql", "sql"]
        await client.generate("a", max_new_tokens=1)
        assert MODEL_KEY not in here.proxy.seen[-1]


async def test_deadlines_and_the_limit_of_a_call_end_it_in_the_replica() -> None:
    engine = EchoEngine(step_s=0.05)
    async with proxied(limit_s=0.3, engine=engine) as here:
        for options in ({"timeout": 0.1}, {}):
            call = here.generation.GenerateStream(asked(text="a" * 200, num_tokens=200), **options)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: here.running.gate.num_running == 0)


async def test_a_stream_that_is_left_at_any_moment_ends_in_the_replica() -> None:
    async with proxied(engine=EchoEngine(step_s=0.002)) as here:
        for pause_s in (0.0, 0.001, 0.002, 0.003, 0.01):
            call = here.generation.GenerateStream(asked(text="a" * 900, num_tokens=900))
            await anext(aiter(call))
            await asyncio.sleep(pause_s)
            call.cancel()
            await until(lambda: here.running.gate.num_running == 0)


async def test_a_replica_that_ends_is_unavailable_and_its_own_errors_stay_what_they_are() -> None:
    async with proxied(engine=EchoEngine(step_s=0.05)) as here:
        here.running.engine.error = ValueError("broken")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.generation.Generate(asked())
        assert refusal_of(caught.value).code is grpc.StatusCode.INTERNAL
        here.running.engine.error, here.proxy.num_ends = None, 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.generation.Generate(asked())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        call = here.generation.GenerateStream(asked())
        await anext(aiter(call))
        here.proxy.num_ends = 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_clients_try_again_what_a_replica_has_not_begun_to_answer() -> None:
    async with proxied() as here, AsyncClient(here.proxy.address) as client:
        for num_ends in (1, 2):
            here.proxy.num_ends = num_ends
            assert (await client.generate("abc", max_new_tokens=3)).text
            here.proxy.num_ends = num_ends
            pieces = [each async for each in client.generate_stream("abc", max_new_tokens=3)]
            assert len(pieces) >= 3
            assert here.proxy.num_ends == 0


async def test_an_upload_may_go_on_at_once_and_is_refused_later() -> None:
    async with proxied() as here:
        call = here.adapters.UploadAdapter()
        await call.write(adapter_pb2.UploadAdapterRequest(chunk=adapter_pb2.FileChunk(data=b"a")))
        assert ("manyhats-upload", "accepted") in tuple(await call.initial_metadata())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert refusal_of(caught.value).fields == ("header",)


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(200):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within two seconds")
