"""Who may call what, over a real port: every method by every role, scopes, and what is told of refusals."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.catalogue.pages import decode_page_token
from manyhats.server.access.rules import RULES
from manyhats.server.access.tokens import Role, new_token
from manyhats.server.grpc.interceptor import OPEN_METHODS
from manyhats.server.observability.logs import configure_logs
from manyhats.v1 import adapter_pb2 as apb
from manyhats.v1 import encoding_pb2 as epb
from manyhats.v1 import generation_pb2 as gpb
from manyhats.v1 import server_pb2 as spb
from support.fakes.server import Running, refused
from support.servers.secure import BOTH, add_token, bearer, secured_server

Call = Callable[[Running, Any], Awaitable[Any]]
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
GENERATION = "/manyhats.v1.GenerationService/"
ENCODING = "/manyhats.v1.EncodingService/"
ADAPTERS = "/manyhats.v1.AdapterService/"


async def stream(server: Running, metadata: Any, task: str = "hats") -> list[Any]:
    call = server.generation.GenerateStream(gpb.GenerateRequest(task_id=task, text="a"), metadata=metadata)
    return [each async for each in call]


async def upload(server: Running, metadata: Any, task: str = "hats") -> Any:
    async def messages() -> AsyncIterator[apb.UploadAdapterRequest]:
        yield apb.UploadAdapterRequest(header=apb.UploadHeader(task_id=task))

    return await server.adapters.UploadAdapter(messages(), metadata=metadata)


async def reflect(server: Running, metadata: Any) -> list[Any]:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    channel: Any = server.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    return [answer async for answer in stub.ServerReflectionInfo(ask(), metadata=metadata)]


def score(task: str) -> gpb.ScoreRequest:
    return gpb.ScoreRequest(task_id=task, text="a", continuations=[gpb.Continuation(text="b")])


INPUTS = [epb.TextInput(text="a")]

# How each method is called about a task; the key is its full name.
CALLS: dict[str, Callable[[Running, Any, str], Awaitable[Any]]] = {
    f"{GENERATION}Generate": lambda server, md, task: server.generation.Generate(
        gpb.GenerateRequest(task_id=task, text="a"), metadata=md
    ),
    f"{GENERATION}GenerateStream": stream,
    f"{GENERATION}Score": lambda server, md, task: server.generation.Score(score(task), metadata=md),
    f"{GENERATION}Tokenize": lambda server, md, task: server.generation.Tokenize(
        gpb.TokenizeRequest(task_id=task, text="a"), metadata=md
    ),
    f"{ENCODING}Embed": lambda server, md, task: server.encoding.Embed(
        epb.EmbedRequest(task_id=task, inputs=INPUTS), metadata=md
    ),
    f"{ENCODING}Classify": lambda server, md, task: server.encoding.Classify(
        epb.ClassifyRequest(task_ids=[task] if task else [], inputs=INPUTS), metadata=md
    ),
    f"{ENCODING}ClassifyTokens": lambda server, md, task: server.encoding.ClassifyTokens(
        epb.ClassifyTokensRequest(task_id=task, inputs=INPUTS), metadata=md
    ),
    f"{ENCODING}Rerank": lambda server, md, task: server.encoding.Rerank(
        epb.RerankRequest(task_id=task, query="a", texts=["b"]), metadata=md
    ),
    f"{ADAPTERS}RegisterAdapter": lambda server, md, task: server.adapters.RegisterAdapter(
        apb.RegisterAdapterRequest(task_id=task, uri="b"), metadata=md
    ),
    f"{ADAPTERS}UploadAdapter": upload,
    f"{ADAPTERS}GetAdapter": lambda server, md, task: server.adapters.GetAdapter(
        apb.GetAdapterRequest(task_id=task), metadata=md
    ),
    f"{ADAPTERS}ListAdapters": lambda server, md, task: server.adapters.ListAdapters(
        apb.ListAdaptersRequest(task_id=task), metadata=md
    ),
    f"{ADAPTERS}ActivateAdapter": lambda server, md, task: server.adapters.ActivateAdapter(
        apb.ActivateAdapterRequest(task_id=f"{task}@1"), metadata=md
    ),
    f"{ADAPTERS}PinAdapter": lambda server, md, task: server.adapters.PinAdapter(
        apb.PinAdapterRequest(task_id=f"{task}@1"), metadata=md
    ),
    f"{ADAPTERS}UnpinAdapter": lambda server, md, task: server.adapters.UnpinAdapter(
        apb.UnpinAdapterRequest(task_id=f"{task}@1"), metadata=md
    ),
    f"{ADAPTERS}DeleteAdapter": lambda server, md, task: server.adapters.DeleteAdapter(
        apb.DeleteAdapterRequest(task_id=task), metadata=md
    ),
    "/manyhats.v1.ServerService/GetServerInfo": lambda server, md, task: server.server.GetServerInfo(
        spb.GetServerInfoRequest(), metadata=md
    ),
    f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": lambda server, md, task: reflect(server, md),
}
READ_ONLY = {name for name in CALLS if name.endswith(("GetAdapter", "ListAdapters", "Info"))}
PROMPTED = {name for name in CALLS if name.startswith((GENERATION, ENCODING))}
# Those that the base model and a task that generates have an answer to.
ANSWERED = {name for name in CALLS if name.startswith(GENERATION)} | {f"{ENCODING}Embed"}
MANAGED = CALLS.keys() - READ_ONLY - PROMPTED
ALLOWED = {Role.GENERATE: PROMPTED | READ_ONLY, Role.MANAGE: MANAGED | READ_ONLY}
NAMING = [name for name in CALLS if not name.endswith("Info")]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.yaml"


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_method_of_every_service_has_a_rule_or_is_open() -> None:
    services: list[ServiceDescriptor] = [
        service
        for file in (gpb, epb, apb, spb, health_pb2, reflection_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    # An older health service has fewer.
    assert methods | {"/grpc.health.v1.Health/List"} == CALLS.keys() | OPEN_METHODS
    names = Counter(name.rpartition("/")[2] for name in CALLS)
    assert set(names.values()) == {1}
    assert names.keys() <= RULES.keys()


@pytest.mark.parametrize("method", CALLS)
async def test_method_is_refused_without_a_token_and_with_a_bad_one(method: str, token_file: Path) -> None:
    token = add_token(token_file, "ops")
    bad = [
        bearer(new_token()),
        bearer(""),
        bearer(token[:-1]),
        (("authorization", token),),
        (("authorization", f"Basic {token}"),),
        (*bearer(token), *bearer(new_token())),
    ]
    async with secured_server(token_file=token_file) as server:
        server.store.register(Registration("hats", Uri("a")))
        missing = await refused(CALLS[method](server, (), "hats"))
        assert (missing.code, missing.reason) == (UNAUTHENTICATED, "CREDENTIAL_MISSING")
        for metadata in bad:
            refusal = await refused(CALLS[method](server, metadata, "hats"))
            assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIAL_INVALID")
            assert (refusal.info.domain, dict(refusal.info.metadata)) == ("manyhats", {})
            assert token not in refusal.message
        assert [record.version for record in server.store.versions("hats")] == [1]
        assert server.engine.requests == []


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", CALLS)
async def test_method_is_for_its_roles_alone(method: str, role: Role, token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "one", [role]))
    async with secured_server(token_file=token_file) as server:
        server.store.register(Registration("hats", Uri("a")))
        if method in ALLOWED[role]:
            assert await code_of(CALLS[method](server, metadata, "hats")) not in (UNAUTHENTICATED, DENIED)
            return
        refusal = await refused(CALLS[method](server, metadata, "hats"))
        needed = "manage" if role is Role.GENERATE else "generate"
        assert (refusal.code, refusal.reason) == (DENIED, "ROLE_MISSING")
        assert dict(refusal.info.metadata) == {"method": method.rpartition("/")[2], "roles": needed}
        assert [record.version for record in server.store.versions("hats")] == [1]
        assert server.engine.requests == []


@pytest.mark.parametrize("method", NAMING)
async def test_scoped_token_reaches_its_tasks_alone_whether_or_not_others_exist(
    method: str, token_file: Path
) -> None:
    metadata = bearer(add_token(token_file, "one", BOTH, ["mine", "team-a.*"]))
    async with secured_server(token_file=token_file) as server:
        for task in ("mine", "team-a.x", "hats"):
            server.store.register(Registration(task, Uri("a")))
        for task in ("mine", "team-a.x"):
            assert await code_of(CALLS[method](server, metadata, task)) not in (UNAUTHENTICATED, DENIED)
        messages = set()
        for task in ("hats", "nothing", "hats@1"):
            refusal = await refused(CALLS[method](server, metadata, task))
            assert (refusal.code, refusal.reason) == (DENIED, "TASK_NOT_ALLOWED")
            assert dict(refusal.info.metadata) == {"task": task.partition("@")[0]}
            messages.add(refusal.message.replace(task.partition("@")[0], "…"))
        assert len(messages) == 1
        assert [record.version for record in server.store.versions("hats")] == [1]


@pytest.mark.parametrize("method", sorted(PROMPTED))
async def test_base_model_is_a_scope_of_its_own(method: str, token_file: Path) -> None:
    without = bearer(add_token(token_file, "without", [Role.GENERATE], ["*"]))
    with_base = bearer(add_token(token_file, "with", [Role.GENERATE], ["_base"]))
    async with secured_server(token_file=token_file) as server:
        server.store.register(Registration("hats", Uri("a")))
        refusal = await refused(CALLS[method](server, without, ""))
        assert (refusal.reason, dict(refusal.info.metadata)) == ("TASK_NOT_ALLOWED", {"task": "_base"})
        code = await code_of(CALLS[method](server, with_base, ""))
        assert code is (grpc.StatusCode.OK if method in ANSWERED else grpc.StatusCode.FAILED_PRECONDITION)
        assert await code_of(CALLS[method](server, with_base, "hats")) is DENIED


async def test_a_priority_above_the_token_s_is_refused_before_anything_runs(token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "one", [Role.GENERATE]))
    async with secured_server(token_file=token_file) as server:
        for priority, code in ((0, grpc.StatusCode.OK), (-3, grpc.StatusCode.OK), (1, DENIED)):
            calls = [
                server.generation.Generate(
                    gpb.GenerateRequest(text="a", priority=priority), metadata=metadata
                ),
                server.encoding.Embed(epb.EmbedRequest(inputs=INPUTS, priority=priority), metadata=metadata),
            ]
            assert [await code_of(call) for call in calls] == [code, code]
        refusal = await refused(
            server.generation.Generate(gpb.GenerateRequest(text="a", priority=1), metadata=metadata)
        )
        assert (refusal.reason, dict(refusal.info.metadata)) == (
            "PRIORITY_NOT_ALLOWED",
            {"max_priority": "0"},
        )
        assert [each.priority for each in server.engine.requests] == [0, -3]


async def test_every_task_of_a_call_is_checked(token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "one", [Role.GENERATE], ["mine"]))
    async with secured_server(token_file=token_file) as server:
        request = epb.ClassifyRequest(task_ids=["mine", "mine@2", "hats@1"], inputs=INPUTS)
        refusal = await refused(server.encoding.Classify(request, metadata=metadata))
        assert (refusal.reason, dict(refusal.info.metadata)) == ("TASK_NOT_ALLOWED", {"task": "hats"})


@pytest.mark.parametrize("method", NAMING)
async def test_what_metadata_say_of_the_task_decides_nothing(method: str, token_file: Path) -> None:
    """``x-manyhats-task`` is for proxies."""
    metadata = bearer(add_token(token_file, "one", BOTH, ["mine"]))
    async with secured_server(token_file=token_file) as server:
        for task in ("mine", "hats"):
            server.store.register(Registration(task, Uri("a")))
        for said in ("mine", "hats", "mine@1", "no such"):
            also = (*metadata, ("x-manyhats-task", said))
            assert await code_of(CALLS[method](server, also, "mine")) not in (UNAUTHENTICATED, DENIED)
            refusal = await refused(CALLS[method](server, also, "hats"))
            assert (refusal.code, refusal.reason) == (DENIED, "TASK_NOT_ALLOWED")


async def test_a_second_header_of_an_upload_is_checked_too(token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "one", [Role.MANAGE], ["mine"]))

    async def messages() -> AsyncIterator[apb.UploadAdapterRequest]:
        yield apb.UploadAdapterRequest(chunk=apb.FileChunk())
        yield apb.UploadAdapterRequest(header=apb.UploadHeader(task_id="hats"))

    async with secured_server(token_file=token_file) as server:
        code = await code_of(server.adapters.UploadAdapter(messages(), metadata=metadata))
        assert code in (DENIED, grpc.StatusCode.INVALID_ARGUMENT)
        assert server.store.tasks == {}


async def test_health_is_open_and_reflection_is_not(token_file: Path) -> None:
    add_token(token_file, "ops")
    async with secured_server(token_file=token_file) as server:
        stub: Any = health_pb2_grpc.HealthStub(server.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert (await refused(reflect(server, ()))).code is UNAUTHENTICATED


async def test_a_method_that_does_not_exist_is_unimplemented(token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "ops"))
    async with secured_server(token_file=token_file) as server:
        for name in ("/manyhats.v1.GenerationService/Nothing", "/no.Service/Method"):
            call = server.channel.unary_unary(name)(b"", metadata=metadata)
            assert await code_of(call) is grpc.StatusCode.UNIMPLEMENTED


async def test_who_may_not_call_is_refused_before_the_message_is_read(token_file: Path) -> None:
    add_token(token_file, "ops")
    async with secured_server(token_file=token_file) as server:
        # No message at all, and one over the limit of sizes: neither is looked at.
        nothing = server.channel.stream_unary(f"{GENERATION}Generate")()
        assert await code_of(nothing) is UNAUTHENTICATED
        huge = gpb.GenerateRequest(text="x" * 10_000_000)
        assert await code_of(server.generation.Generate(huge)) is UNAUTHENTICATED


async def test_changes_of_the_token_file_hold_for_the_next_call(token_file: Path) -> None:
    first, token = add_token(token_file, "first"), new_token()
    async with secured_server(token_file=token_file) as server:

        async def code() -> grpc.StatusCode:
            request = spb.GetServerInfoRequest()
            return await code_of(server.server.GetServerInfo(request, metadata=bearer(token)))

        assert await code() is UNAUTHENTICATED
        add_token(token_file, "second", token=token)
        assert await code() is grpc.StatusCode.OK
        replace_tokens(token_file, "first", first)
        assert await code() is UNAUTHENTICATED


def replace_tokens(token_file: Path, name: str, token: str) -> None:
    token_file.unlink()
    add_token(token_file, name, token=token)


async def test_list_shows_the_scope_page_by_page_and_its_tokens_name_nothing_else(token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "one", [Role.GENERATE], ["*b*"]))
    async with secured_server(token_file=token_file) as server:
        tasks = [f"{a}{b}" for a in "abc" for b in "abc"]
        for task in tasks:
            server.store.register(Registration(task, Uri("x")))
            server.store.register(Registration(task, Uri("y")))
        seen: list[tuple[str, int]] = []
        tokens = []
        request = apb.ListAdaptersRequest(page_size=3)
        while True:
            page = await server.adapters.ListAdapters(request, metadata=metadata)
            seen += [(adapter.task_id, adapter.version) for adapter in page.adapters]
            assert len(page.adapters) <= 3
            if not page.next_page_token:
                break
            tokens.append(page.next_page_token)
            request.page_token = page.next_page_token
    wanted = [task for task in tasks if "b" in task]
    assert seen == [(task, version) for task in wanted for version in (1, 2)]
    assert [decode_page_token(token, "")[0] for token in tokens] == [seen[i][0] for i in (2, 5, 8)]


async def test_list_ends_where_only_hidden_tasks_follow(token_file: Path) -> None:
    metadata = bearer(add_token(token_file, "one", [Role.GENERATE], ["a"]))
    async with secured_server(token_file=token_file) as server:
        for task in ("a", "z"):
            server.store.register(Registration(task, Uri("x")))
        page = await server.adapters.ListAdapters(apb.ListAdaptersRequest(page_size=1), metadata=metadata)
    assert ([adapter.task_id for adapter in page.adapters], page.next_page_token) == (["a"], "")


@pytest.mark.usefixtures("own_logs")
async def test_logs_name_the_token_and_never_hold_it(
    token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("json", "info")
    good, unknown = add_token(token_file, "ci", [Role.GENERATE], ["mine"]), new_token()
    async with secured_server(token_file=token_file) as server:
        for metadata, task in ((bearer(good), "mine"), (bearer(good), "hats"), (bearer(unknown), "hats")):
            await code_of(
                server.generation.Generate(gpb.GenerateRequest(task_id=task, text="a"), metadata=metadata)
            )
        await code_of(reflect(server, bearer(unknown)))
    text = capsys.readouterr().err
    assert good not in text
    assert unknown not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    calls = [line for line in lines if line["event"] == "call"]
    assert [(line["code"], line.get("caller")) for line in calls] == [
        ("NOT_FOUND", "ci"),
        ("PERMISSION_DENIED", "ci"),
        ("UNAUTHENTICATED", None),
    ]
    assert calls[2]["peer"].startswith("ipv4:127.0.0.1")


@pytest.mark.usefixtures("own_logs")
async def test_log_line_of_an_upload_names_its_task(
    token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("json", "info")
    ops = add_token(token_file, "ops")
    async with secured_server(token_file=token_file) as server:
        for task in ("mine", "../no"):
            header = apb.UploadAdapterRequest(header=apb.UploadHeader(task_id=task))
            await code_of(server.adapters.UploadAdapter(iter([header]), metadata=bearer(ops)))
        await code_of(server.adapters.UploadAdapter(iter([]), metadata=bearer(ops)))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["task"] for line in lines if line.get("method") == "UploadAdapter"] == ["mine", "../no", ""]


async def test_refused_calls_are_counted_and_not_as_the_base_models(token_file: Path) -> None:
    add_token(token_file, "ops")
    async with secured_server(token_file=token_file) as server:
        for method in sorted(PROMPTED):
            await refused(CALLS[method](server, (), ""))
        counted = [
            (sample.labels["method"], sample.labels["task"], sample.labels["code"], sample.value)
            for metric in server.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "manyhats_requests_total"
        ]
    methods = sorted(name.rpartition("/")[2] for name in PROMPTED)
    assert sorted(counted) == [(method, "", "UNAUTHENTICATED", 1.0) for method in methods]


async def test_without_a_token_file_everybody_may_do_everything() -> None:
    async with secured_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        codes = await asyncio.gather(*(code_of(CALLS[name](server, (), "hats")) for name in sorted(ANSWERED)))
    assert set(codes) == {grpc.StatusCode.OK}
