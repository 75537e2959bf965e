"""AdapterService and ServerService over a real port."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from manyhats.adapters.errors import AdapterInvalidError
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2, server_pb2
from server_fakes import INFO, refused, running_server


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
    assert not adapter.HasField("effect")


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


async def test_adapter_that_cannot_be_loaded_now_is_registered_all_the_same() -> None:
    async with running_server() as server:
        server.engine.warm_error = AdapterInvalidError("x", "no room")
        answer = await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="hats", uri="a"))
    assert answer.adapter.residency == pb.ADAPTER_RESIDENCY_DISK


async def test_exactly_one_of_uri_and_parts() -> None:
    part = pb.AdapterPart(uri="a", weight=0.5)
    async with running_server() as server:
        neither = await refused(server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id="t")))
        both_request = pb.RegisterAdapterRequest(task_id="t", uri="a", parts=[part])
        both = await refused(server.adapters.RegisterAdapter(both_request))
        parts_request = pb.RegisterAdapterRequest(task_id="t", parts=[part])
        composed = await refused(server.adapters.RegisterAdapter(parts_request))
    assert (neither.reason, neither.fields) == ("FIELD_INVALID", ("uri",))
    assert (both.reason, both.fields) == ("FIELD_INVALID", ("uri",))
    assert composed.code is grpc.StatusCode.UNIMPLEMENTED


async def test_list_goes_page_by_page_and_by_task() -> None:
    async with running_server() as server:
        for task_id in ("a", "b", "c"):
            server.store.register(task_id, "x")
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
        server.engine.pinned.add("sha256:a")
        refusal = await refused(server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats")))
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats", force=True))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE")
    assert server.store.tasks == {}


async def test_upload_and_activate_say_that_they_are_not_served() -> None:
    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=pb.UploadHeader(task_id="hats"))

    async with running_server() as server:
        upload = await refused(server.adapters.UploadAdapter(messages()))
        activate = await refused(server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1")))
    for refusal in (upload, activate):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_OFFERED")
        assert "not served by this version" in refusal.message


async def test_server_info_describes_the_base_model() -> None:
    async with running_server() as server:
        info = await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert (info.base_model, info.base_digest, info.quantization) == (INFO.name, INFO.digest, "nf4")
    assert (info.dtype, info.device, info.max_context_length, info.vocab_size) == ("bfloat16", "cpu", 64, 300)
    assert info.version


def test_every_kind_of_the_domain_has_its_value_in_the_api() -> None:
    # The conversion tables are made at import; the API may name more, but never less.
    from manyhats.server import to_proto

    assert len(to_proto._METHODS) == len(pb.AdapterMethod.keys()) - 1
    assert len(to_proto._STATES) == len(pb.AdapterState.keys()) - 1
    assert len(to_proto._FINISH_REASONS) == len(generation_pb2.FinishReason.keys()) - 1
