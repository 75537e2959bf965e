"""Tasks composed of several adapters, over a real port and on a real store."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import composed_digest
from manyhats.adapters.store.opening import open_store
from manyhats.v1 import adapter_pb2 as pb
from support.factories.adapters import make_lora
from support.factories.prefixes import make_prefix, tiny_base
from support.fakes.server import Refusal, Running, refused, running_server

BASE = tiny_base()


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Running]:
    """A server whose root has LoRAs of ranks 2 and 8 and two prefixes."""
    root = tmp_path / "root"
    for rank in (2, 8):
        make_lora(root / f"lora-{rank}", BASE, rank=rank, seed=rank)
    for seed in (1, 2):
        make_prefix(root / f"prefix-{seed}", BASE, seed=seed)
    store = open_store(tmp_path / "store", BASE, [root], limits=AdapterLimits(max_parts=3))
    try:
        async with running_server(store=store) as server:
            yield server
    finally:
        store.close()


def composed(tmp_path: Path, *parts: tuple[str, float]) -> pb.RegisterAdapterRequest:
    given = [
        pb.AdapterPart(uri=name if name.startswith("/") else str(tmp_path / "root" / name), weight=weight)
        for name, weight in parts
    ]
    return pb.RegisterAdapterRequest(task_id="both", parts=given)


async def test_composed_task_tells_of_what_it_is_made(tmp_path: Path) -> None:
    parts = (("lora-2", 0.5), ("lora-8", -1.0), ("prefix-1", 1.0))
    async with serving(tmp_path) as server:
        plain = [
            await server.adapters.RegisterAdapter(
                pb.RegisterAdapterRequest(task_id=name, uri=str(tmp_path / "root" / name))
            )
            for name, _ in parts
        ]
        answer = await server.adapters.RegisterAdapter(composed(tmp_path, *parts))
        again = await server.adapters.RegisterAdapter(composed(tmp_path, *reversed(parts)))
        found = await server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="both"))
    adapter = answer.adapter
    assert adapter.method == pb.ADAPTER_METHOD_COMPOSED
    assert [(part.digest, part.weight) for part in adapter.parts] == [
        (each.adapter.digest, weight) for each, (_, weight) in zip(plain, parts, strict=True)
    ]
    assert [Path(part.source).name for part in adapter.parts] == [name for name, _ in parts]
    assert adapter.digest == composed_digest((part.digest, part.weight) for part in adapter.parts)
    assert adapter.size_bytes == sum(each.adapter.size_bytes for each in plain)
    assert adapter.effect == 0.25
    assert (again.created, again.adapter.version) == (False, 1)
    assert found.adapter == adapter


async def refusal_of_parts(server: Running, request: pb.RegisterAdapterRequest) -> Refusal:
    refusal = await refused(server.adapters.RegisterAdapter(request))
    assert server.store.list().records == ()
    return refusal


@pytest.mark.parametrize(
    ("parts", "reason", "text"),
    [
        ((("lora-2", 1.0), ("nowhere", 1.0)), "SOURCE_NOT_FOUND", "parts[1].uri"),
        ((("/etc", 1.0), ("lora-2", 1.0)), "SOURCE_NOT_ALLOWED", "parts[0].uri"),
        ((("prefix-1", 1.0), ("prefix-2", 1.0)), "ADAPTER_UNSUPPORTED", "parts[1]"),
        ((("lora-2", 1.0), ("prefix-1", 0.5)), "ADAPTER_UNSUPPORTED", "parts[1]"),
        ((("lora-2", 0.0), ("lora-8", 1.0)), "ADAPTER_INVALID", "parts[0]"),
        ((("lora-2", 1.0), ("lora-8", math.nan)), "ADAPTER_INVALID", "parts[1]"),
        ((("lora-2", 1.0),) * 4, "FIELD_INVALID", "parts"),
    ],
)
async def test_part_that_cannot_be_is_named(
    tmp_path: Path, parts: tuple[tuple[str, float], ...], reason: str, text: str
) -> None:
    async with serving(tmp_path) as server:
        refusal = await refusal_of_parts(server, composed(tmp_path, *parts))
    assert refusal.reason == reason
    assert text in refusal.message
    assert str(tmp_path / "store") not in refusal.message


async def test_deleting_one_task_keeps_the_part_that_another_needs(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        uri = str(tmp_path / "root" / "lora-2")
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="alone", uri=uri))
        await server.adapters.RegisterAdapter(composed(tmp_path, ("lora-2", 1.0), ("lora-8", 1.0)))
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="alone"))
        loaded = server.store.load(server.store.resolve("both"))
        assert len(loaded.artifacts) == 2
        refusal = await refused(server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="alone")))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
