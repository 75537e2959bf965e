"""The task that a call names, said beside its message for proxies: by both clients, over a real port."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from manyhats.client import AsyncClient, Client, Credentials
from manyhats.client.channel import task_metadata
from manyhats.v1 import encoding_pb2, generation_pb2
from support.fakes.client import FakeServer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_every_call_says_which_task_it_is_about(fake: FakeServer, directory: Path) -> None:
    with Client(fake.target) as client:
        client.generate("a", task_id="sql")
        client.generate_stream("a", task_id="sql@2").result()
        client.score("a", ["b"], task_id="sql")
        client.tokenize("a", task_id="sql")
        client.embed(["a"], task_id="topics")
        client.classify(["a"], task_id=["mood@3", "spam"])
        client.tag(["a"], task_id="names")
        client.rerank("a", ["b"], task_id="relevance")
        client.register_adapter("sql", "/a")
        client.upload_adapter("sql", directory)
        client.get_adapter("sql@1")
        client.activate_adapter("sql@1")
        client.pin_adapter("sql")
        client.unpin_adapter("sql")
        client.delete_adapter("sql")
        list(client.list_adapters(task_id="sql"))
        tasks = [
            "sql",
            "sql@2",
            "sql",
            "sql",
            "topics",
            "mood@3",
            "names",
            "relevance",
            "sql",
            "sql",
            "sql@1",
        ]
        assert fake.named_tasks == [*tasks, "sql@1", *["sql"] * 4]
        fake.named_tasks.clear()
        client.generate("a")
        client.server_info()
        client.wait_ready()
        assert fake.named_tasks == [None] * 3


async def test_the_asyncio_client_does_so_too(fake: FakeServer, directory: Path) -> None:
    async with AsyncClient(fake.target) as client:
        await client.generate("a", task_id="sql")
        await client.generate_stream("a", task_id="sql@2").result()
        await client.classify(["a"], task_id=["mood", "spam"])
        await client.upload_adapter("sql", directory)
        await client.generate("a")
    assert fake.named_tasks == ["sql", "sql@2", "mood", "sql", None]


async def test_beside_a_token_and_on_a_channel_of_the_caller_s(fake: FakeServer) -> None:
    with Client(fake.target, credentials=Credentials(token="mh_secret")) as client:
        client.generate("a", task_id="sql")
    assert (fake.named_tasks, fake.authorizations) == (["sql"], ["Bearer mh_secret"])
    with grpc.insecure_channel(fake.target) as channel:
        Client(channel=channel).generate("a", task_id="tldr")
    async with grpc.aio.insecure_channel(fake.target) as achannel:
        await AsyncClient(channel=achannel).generate("a", task_id="mood")
    assert fake.named_tasks == ["sql", "tldr", "mood"]


@pytest.mark.parametrize("name", ["", "späm", "sql\n", "a: b", "sql@", "SQL", "x" * 64, "sql@one", "@1"])
def test_what_cannot_be_a_task_is_left_to_the_server(name: str) -> None:
    assert task_metadata(generation_pb2.GenerateRequest(task_id=name)) == ()


def test_what_can_be_a_task_is_said() -> None:
    for name in ("sql", "team-a.x_1@12", "x" * 63):
        assert task_metadata(generation_pb2.GenerateRequest(task_id=name)) == (("x-manyhats-task", name),)
    assert task_metadata(encoding_pb2.ClassifyRequest()) == ()
    assert task_metadata(iter(())) == ()
