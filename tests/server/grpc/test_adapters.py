"""AdapterService and ServerService over a real port."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc

from manyhats.adapters.errors import AdapterInvalidError, DataLossError, StoreFullError
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.registration import Registered, Registration, Uri
from manyhats.engine.errors import AdapterCapacityError
from manyhats.server.lifetime.config import ServeConfig
from manyhats.settings.declaration import values_of
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2, server_pb2
from support.fakes.server import (
    INFO,
    MemoryStore,
    Running,
    eventually,
    make_record,
    refused,
    running_server,
)


async def test_register_answers_with_the_version_and_loads_it() -> None:
    async with running_server() as server:
        answer = await server.adapters.RegisterAdapter(
            pb.RegisterAdapterRequest(task_id="hats", uri="a", labels={"team": "x"})
        )
    adapter = answer.adapter
    assert answer.created
    assert (adapter.task_id, adapter.version, adapter.digest) == ("hats", 1, "sha256:a")
    assert (adapter.method, adapter.state) == (pb.ADAPTER_METHOD_LORA, pb.ADAPTER_STATE_ACTIVE)
    assert (adapter.size_bytes, adapter.num_parameters, adapter.source) == (100, 50, "a")
    assert dict(adapter.labels) == {"team": "x"}
    assert list(adapter.notes) == ["a note"]
    assert adapter.create_time.ToDatetime().year == 2026
    assert adapter.residency == pb.ADAPTER_RESIDENCY_DEVICE
    assert adapter.effect == 0.25
    assert [(part.digest, part.weight, part.source) for part in adapter.parts] == [("sha256:a", 1.0, "a")]


async def test_register_again_is_the_version_that_exists() -> None:
    async with running_server() as server:
        request = pb.RegisterAdapterRequest(task_id="hats", uri="a")
        first = await server.adapters.RegisterAdapter(request)
        again = await server.adapters.RegisterAdapter(request)
    assert (again.adapter, again.created) == (first.adapter, False)


async def test_register_without_activating_leaves_the_active_version() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
        request = pb.RegisterAdapterRequest(task_id="hats", uri="b", activate=False)
        second = await server.adapters.RegisterAdapter(request)
        active = await server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="hats"))
    assert second.adapter.state == pb.ADAPTER_STATE_INACTIVE
    assert second.adapter.residency == pb.ADAPTER_RESIDENCY_DISK
    assert active.adapter.version == 1


async def test_validate_only_stores_nothing() -> None:
    async with running_server() as server:
        request = pb.RegisterAdapterRequest(task_id="hats", uri="a", validate_only=True)
        answer = await server.adapters.RegisterAdapter(request)
        refusal = await refused(server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="hats")))
        assert server.engine.resident == {}
    assert (answer.adapter.digest, answer.created) == ("sha256:a", False)
    assert refusal.reason == "TASK_NOT_FOUND"


async def test_adapter_without_a_slot_is_in_the_host_s_memory() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
        server.engine.without_slot.add("sha256:a")
        answer = await server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="hats"))
        listed = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert answer.adapter.residency == pb.ADAPTER_RESIDENCY_HOST
    assert [adapter.residency for adapter in listed.adapters] == [pb.ADAPTER_RESIDENCY_HOST]


async def test_adapter_that_cannot_be_loaded_now_is_registered_all_the_same() -> None:
    async with running_server() as server:
        server.engine.warm_error = AdapterInvalidError("x", "no room")
        answer = await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
    assert answer.adapter.residency == pb.ADAPTER_RESIDENCY_DISK


async def test_effect_is_what_the_engine_measures() -> None:
    async with running_server() as server:
        server.engine.effect = 1.5
        request = pb.RegisterAdapterRequest(task_id="hats", uri="a", validate_only=True)
        answer = await server.adapters.RegisterAdapter(request)
        assert [probed.digest for probed in server.engine.probed] == ["sha256:a"]
    assert answer.adapter.effect == 1.5


async def test_version_is_loaded_before_it_goes_live() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
        server.engine.warm_s = 0.2
        second = asyncio.ensure_future(
            server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="b"))
        )
        await eventually(lambda: len(server.engine.warmed) == 2)
        assert server.store.resolve("hats").version == 1
        await second
        assert server.store.resolve("hats").version == 2
        assert server.engine.resident_digests() == {"sha256:a", "sha256:b"}


async def test_version_loaded_for_a_registration_that_fails_is_forgotten() -> None:
    class FailingStore(MemoryStore):
        def register(self, registration: Registration, **options: Any) -> Registered:
            uri = registration.source_name
            options["prepare"](make_record(registration.task_id, 0, uri), LoweredAdapter(uri, ()))
            raise StoreFullError("store", "no space is left")

    async with running_server(store=FailingStore()) as server:
        refusal = await refused(
            server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
        )
        assert [record.digest for record in server.engine.warmed] == ["sha256:a"]
        assert server.engine.resident == {}
    assert refusal.reason == "STORE_FULL"


async def test_composed_task_shows_its_parts() -> None:
    parts = [pb.AdapterPart(uri="a", weight=0.5), pb.AdapterPart(uri="b")]
    async with running_server() as server:
        answer = await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="t", parts=parts))
    assert answer.adapter.method == pb.ADAPTER_METHOD_COMPOSED
    assert [(part.digest, part.weight, part.source) for part in answer.adapter.parts] == [
        ("sha256:a", 0.5, "a"),
        ("sha256:b", 1.0, "b"),
    ]


async def test_exactly_one_of_uri_and_parts_and_every_part_has_a_uri() -> None:
    part = pb.AdapterPart(uri="a", weight=0.5)
    async with running_server() as server:
        for request, field in (
            (pb.RegisterAdapterRequest(task_id="t"), "uri"),
            (pb.RegisterAdapterRequest(task_id="t", uri="a", parts=[part]), "uri"),
            (pb.RegisterAdapterRequest(task_id="t", parts=[part, pb.AdapterPart(weight=2)]), "parts[1].uri"),
        ):
            refusal = await refused(server.adapters.RegisterAdapter(request))
            assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))
        assert server.store.tasks == {}


async def register_two(server: Running) -> None:
    for uri in ("a", "b"):
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri=uri))


async def version_that_answers(server: Running) -> int:
    answer = await server.generation.Generate(generation_pb2.GenerateRequest(task_id="hats", text="a"))
    return int(answer.adapter.version)


async def test_activate_moves_a_task_back_and_forth() -> None:
    async with running_server() as server:
        await register_two(server)
        for version in (1, 2, 1):
            request = pb.ActivateAdapterRequest(task_id=f"hats@{version}")
            answer = await server.adapters.ActivateAdapter(request)
            assert (answer.adapter.version, answer.adapter.state) == (version, pb.ADAPTER_STATE_ACTIVE)
            assert await version_that_answers(server) == version


async def test_activate_loads_the_version_before_it_switches() -> None:
    async with running_server() as server:
        await register_two(server)
        server.engine.resident.clear()
        server.engine.warmed.clear()
        server.engine.warm_s = 0.2
        activating = asyncio.ensure_future(
            server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        )
        await eventually(lambda: len(server.engine.warmed) == 1)
        assert await version_that_answers(server) == 2
        answer = await activating
        assert answer.adapter.residency == pb.ADAPTER_RESIDENCY_DEVICE
        assert await version_that_answers(server) == 1


async def test_version_that_cannot_be_loaded_is_not_activated() -> None:
    async with running_server() as server:
        await register_two(server)
        server.engine.warm_error = DataLossError("hats@1", "its stored files are damaged")
        refusal = await refused(server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1")))
        assert await version_that_answers(server) == 2
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "DATA_LOSS")


async def test_version_without_room_for_it_now_is_activated_all_the_same() -> None:
    async with running_server() as server:
        await register_two(server)
        server.engine.warm_error = AdapterCapacityError(4)
        await server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        assert await version_that_answers(server) == 1


async def test_activate_needs_a_version_that_exists() -> None:
    async with running_server() as server:
        await register_two(server)
        for name, reason in (
            ("hats", "FIELD_INVALID"),
            ("hats@x", "FIELD_INVALID"),
            ("hats@3", "TASK_NOT_FOUND"),
            ("other@1", "TASK_NOT_FOUND"),
        ):
            refusal = await refused(server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id=name)))
            assert refusal.reason == reason


async def test_list_goes_page_by_page_and_by_task() -> None:
    async with running_server() as server:
        for task_id in ("a", "b", "c"):
            server.store.register(Registration(task_id, Uri("x")))
        first = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2))
        token = first.next_page_token
        rest = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2, page_token=token))
        one = await server.adapters.ListAdapters(pb.ListAdaptersRequest(task_id="b"))
    assert [adapter.task_id for adapter in first.adapters] == ["a", "b"]
    assert [adapter.task_id for adapter in rest.adapters] == ["c"]
    assert rest.next_page_token == ""
    assert [adapter.task_id for adapter in one.adapters] == ["b"]


async def test_delete_says_what_went_and_frees_its_memory() -> None:
    async with running_server() as server:
        for uri in ("a", "b"):
            await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri=uri))
        one = await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats@1"))
        assert set(server.engine.resident) == {"sha256:b"}
        rest = await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats"))
        assert server.engine.resident == {}
        again = await refused(server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats")))
    assert [adapter.version for adapter in one.adapters] == [1]
    assert [adapter.version for adapter in rest.adapters] == [2]
    assert again.reason == "TASK_NOT_FOUND"


async def test_delete_of_a_version_in_use_needs_force() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="others", uri="a"))
        server.engine.used.add("hats@1")
        refusal = await refused(server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats")))
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="others"))
        assert set(server.engine.resident) == {"sha256:a"}, "hats is made of these bytes, too"
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats", force=True))
        assert server.engine.resident == {}
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE")
    assert server.store.tasks == {}


async def test_forced_deletion_refuses_new_calls_at_once_and_lets_running_ones_finish() -> None:
    async with running_server() as server:
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
        server.engine.step_s = 0.02
        request = generation_pb2.GenerateRequest(task_id="hats", text="a long one")
        running = asyncio.ensure_future(server.generation.Generate(request))
        await eventually(lambda: server.engine.running == 1)
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats", force=True))
        refusal = await refused(server.generation.Generate(request))
        answer = await running
    assert refusal.reason == "TASK_NOT_FOUND"
    assert (answer.text, answer.adapter.version) == ("a long one", 1)


async def test_deletion_keeps_loaded_what_another_task_has() -> None:
    async with running_server() as server:
        for task_id in ("hats", "caps"):
            await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id=task_id, uri="a"))
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats"))
        assert server.engine.resident_digests() == {"sha256:a"}


async def test_server_info_describes_the_base_model() -> None:
    async with running_server() as server:
        info = await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert (info.base_model, info.base_digest, info.quantization) == (INFO.name, INFO.digest, "nf4")
    assert (info.dtype, info.device, info.max_context_length, info.vocab_size) == (
        "bfloat16",
        "cpu",
        1024,
        300,
    )
    assert info.version


async def test_server_info_tells_the_limits() -> None:
    async with running_server() as server:
        limits = (await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())).limits
    config = SimpleNamespace(**values_of(ServeConfig()))
    assert limits.max_request_bytes == 8 * 1024 * 1024
    assert (limits.max_sequences, limits.max_waiting) == (config.max_sequences, config.max_waiting)
    assert (limits.max_adapters, limits.max_continuations) == (4, 1024)
    assert (limits.max_artifact_bytes, limits.max_parts) == (config.max_artifact_bytes, config.max_parts)
    assert (limits.max_adapter_rank, limits.max_virtual_tokens) == (256, 4096)
    assert limits.max_transfers == config.max_transfers
    assert not limits.HasField("max_versions_per_task")
    assert not limits.HasField("max_bytes_per_task")
    # These are larger than their fields can hold, and told as the most that they can.
    assert (limits.max_tasks, limits.max_bytes) == (2**32 - 1, 2**64 - 1)


def test_every_kind_of_the_domain_has_its_value_in_the_api() -> None:
    # The conversion tables are made at import; the API may name more, but never less.
    from manyhats.server.grpc import to_proto

    assert len(to_proto._METHODS) == len(pb.AdapterMethod.keys()) - 1
    assert len(to_proto._STATES) == len(pb.AdapterState.keys()) - 1
    assert len(to_proto._FINISH_REASONS) == len(generation_pb2.FinishReason.keys()) - 1
