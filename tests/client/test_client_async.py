"""The asyncio client over a real port."""

from __future__ import annotations

import asyncio
import inspect
import threading

import grpc.aio
import pytest

from manyhats.client import AsyncClient, Client, FinishReason, Tokenization, UnavailableError
from support.fakes.client import PIECES, TEXT, FakeServer


def test_the_two_clients_take_the_same_arguments() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)


async def test_every_unary_call(fake: FakeServer) -> None:
    async with AsyncClient(fake.target) as client:
        assert (await client.generate("hi", task_id="sql", temperature=0.5)).text == TEXT
        assert [score.logprob for score in (await client.score("a", ["b", "c"])).scores] == [-1.0, -2.0]
        assert await client.tokenize([1, 2]) == Tokenization((1, 2), ("a", "b"))
        assert (await client.register_adapter("sql", "/adapters/sql")).adapter.name == "sql@3"
        assert (await client.register_adapter("sql", parts=[("/a", 2.0)])).created
        assert (await client.activate_adapter("sql@1")).name == "sql@1"
        assert (await client.pin_adapter("sql@2")).pinned
        assert not (await client.unpin_adapter("sql")).pinned
        assert (await client.get_adapter("sql")).name == "sql@2"
        assert [info.name for info in await client.delete_adapter("sql")] == ["sql@1", "sql@2"]
        assert (await client.server_info()).device == "cpu"


async def test_list_adapters_fetches_pages_as_needed(fake: FakeServer) -> None:
    async with AsyncClient(fake.target) as client:
        assert [info.name async for info in client.list_adapters()] == ["sql@1", "sql@2", "tldr@1"]
    assert len(fake.requests) == 2


async def test_answers_may_be_larger_than_the_default_of_grpc(fake: FakeServer) -> None:
    fake.adapters[0].source = "x" * 5_000_000
    async with AsyncClient(fake.target) as client:
        assert len((await anext(aiter(client.list_adapters()))).source) == 5_000_000


async def test_stream_gives_pieces_and_then_the_whole(fake: FakeServer) -> None:
    async with AsyncClient(fake.target) as client, client.generate_stream("hi", task_id="sql") as stream:
        assert [chunk.text async for chunk in stream] == list(PIECES)
        whole = await stream.result()
    assert (whole.text, whole.finish_reason) == (TEXT, FinishReason.LENGTH)


async def test_leaving_a_stream_early_cancels_it_on_the_server(fake: FakeServer) -> None:
    fake.is_endless = True
    async with AsyncClient(fake.target) as client, client.generate_stream("hi") as stream:
        await anext(stream)
        await stream.close()
        assert await asyncio.to_thread(fake.stream_ended.wait, 5)
        assert [chunk async for chunk in stream] == []


async def test_close_from_another_task_ends_the_iteration(fake: FakeServer) -> None:
    fake.is_endless = True

    async def close_soon() -> None:
        await asyncio.sleep(0.1)
        await stream.close()

    async with AsyncClient(fake.target) as client, client.generate_stream("hi") as stream:
        closing = asyncio.create_task(close_soon())
        async for _ in stream:
            pass
        await closing
        assert await asyncio.to_thread(fake.stream_ended.wait, 5)


async def test_cancelling_the_reading_task_cancels_on_the_server(fake: FakeServer) -> None:
    fake.is_endless = True

    async def read(client: AsyncClient) -> None:
        async with client.generate_stream("hi") as stream:
            async for _ in stream:
                started.set()

    started = asyncio.Event()
    async with AsyncClient(fake.target) as client:
        reading = asyncio.create_task(read(client))
        await started.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(fake.stream_ended.wait, 5)


async def test_streams_run_side_by_side(fake: FakeServer) -> None:
    async with AsyncClient(fake.target) as client:
        answers = await asyncio.gather(*(client.generate_stream("hi").result() for _ in range(5)))
    assert [answer.text for answer in answers] == [TEXT] * 5


async def test_wait_ready(fake: FakeServer) -> None:
    fake.set_serving(False)
    async with AsyncClient(fake.target) as client:
        with pytest.raises(UnavailableError, match="not serving yet"):
            await client.wait_ready(timeout_s=0.3)
        threading.Timer(0.2, fake.set_serving, [True]).start()
        await client.wait_ready(timeout_s=10)
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match="does not answer"):
            await client.wait_ready(timeout_s=0.3)


async def test_a_channel_of_the_caller_stays_open(fake: FakeServer) -> None:
    async with grpc.aio.insecure_channel(fake.target) as channel:
        async with AsyncClient(channel=channel) as client:
            await client.server_info()
        assert (await AsyncClient(channel=channel).server_info()).version == "0.1.0"
