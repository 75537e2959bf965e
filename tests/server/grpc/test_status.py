"""Domain errors as callers see them: the table itself, and its rows over a real port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]

from manyhats.adapters import errors as adapter_errors
from manyhats.adapters.registration import Registration, Uri
from manyhats.client import AsyncClient, QueueFullError
from manyhats.engine import errors as engine_errors
from manyhats.server.access import errors as access_errors
from manyhats.server.grpc.status import grpc_code, status_of
from manyhats.server.service import errors as service_errors
from manyhats.server.service.reasons import is_expected, reason_of
from manyhats.v1 import adapter_pb2, server_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import ByteTokenizer, Running, eventually, refused, running_server

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def test_unexpected_error_shows_only_its_id() -> None:
    status = status_of(service_errors.UnexpectedError("id7"))
    assert status.message == "internal error id7"
    assert not is_expected(KeyError("/etc/secret"))
    assert reason_of(KeyError("/etc/secret")).word == "INTERNAL"
    assert b"secret" not in status_of(KeyError("/etc/secret")).SerializeToString()


def test_long_message_is_cut_so_that_it_fits_in_headers() -> None:
    status = status_of(engine_errors.FieldInvalidError("text", "x" * 100_000))
    assert len(status.SerializeToString()) < 4000


HOSTILE_TEXTS = {
    "half of a surrogate pair": "\ud800 bad",
    "many halves": "\udfff" * 5000,
    "four bytes each": "\U0001f600" * 5000,
    "three bytes each": "\u65e5" * 5000,
    "two bytes each": "\u00e9" * 5000,
    "a byte, then four each": "a" + "\U0001f600" * 5000,
    "control characters": "\x00\x01\n\r\x7f" * 2000,
    "percent signs": "%" * 5000,
    "nothing": "",
}
MADE_OF_TEXT: dict[str, Callable[[str], Exception]] = {
    "a field": lambda text: engine_errors.FieldInvalidError("chat", text),
    "a field's name": lambda text: engine_errors.FieldInvalidError(text, text),
    "an argument": lambda text: adapter_errors.ArgumentInvalidError(text, text),
    "an adapter": lambda text: adapter_errors.AdapterInvalidError(text, text),
    "a draining": lambda text: engine_errors.DrainingError(text),
    "a failed request": lambda text: engine_errors.RequestFailedError(text),
    "a task": lambda text: access_errors.TaskNotAllowedError(text),
    "anything": lambda text: RuntimeError(text),
}


@pytest.mark.parametrize("make", MADE_OF_TEXT.values(), ids=MADE_OF_TEXT.keys())
@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_a_status_of_any_text_fits_in_headers(make: Callable[[str], Exception], text: str) -> None:
    error = make(text)
    status = status_of(error)
    assert status.code == grpc_code(reason_of(error)).value[0]
    in_headers = 3 * len(status.message.encode()) + len(status.SerializeToString()) * 4 / 3
    assert in_headers < 7500


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
async def test_a_refusal_of_any_text_reaches_its_caller(text: str) -> None:
    async with running_server() as server:
        server.engine.error = engine_errors.FieldInvalidError("chat", text)
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="a")))
        assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "FIELD_INVALID", ("chat",))


def _asking(**fields: dict[str, Any]) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", **fields)  # type: ignore[arg-type]


BAD_REQUESTS: list[tuple[str, pb.GenerateRequest]] = [
    ("prompt", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("text", pb.GenerateRequest(text="x" * (1024 * 1024 + 1))),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300]))),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1]))),
    ("chat.messages", pb.GenerateRequest(chat=pb.ChatMessages())),
    ("chat.messages", pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="u")] * 1025))),
    ("chat.messages[0].role", pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage()]))),
    ("chat", pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="refused")]))),
    ("request_id", pb.GenerateRequest(text="a", request_id="x" * 129)),
    ("request_id", pb.GenerateRequest(text="a", request_id="a\nb")),
    ("cache_salt", pb.GenerateRequest(text="a", cache_salt="x" * 257)),
    ("task_id", pb.GenerateRequest(text="a", task_id="../etc")),
    ("task_id", pb.GenerateRequest(text="a", task_id="a,b")),
    ("task_id", pb.GenerateRequest(text="a", task_id="a@0")),
    ("sampling.temperature", _asking(sampling={"temperature": float("nan")})),
    ("sampling.temperature", _asking(sampling={"temperature": -1})),
    ("sampling.top_p", _asking(sampling={"top_p": 0})),
    ("sampling.min_p", _asking(sampling={"min_p": 1.5})),
    ("sampling.typical_p", _asking(sampling={"typical_p": 2})),
    ("sampling.repetition_penalty", _asking(sampling={"repetition_penalty": 0})),
    ("sampling.presence_penalty", _asking(sampling={"presence_penalty": float("inf")})),
    ("sampling.frequency_penalty", _asking(sampling={"frequency_penalty": 101})),
    ("sampling.logit_bias", _asking(sampling={"logit_bias": {1: float("nan")}})),
    ("stopping.max_new_tokens", _asking(stopping={"max_new_tokens": 0})),
    ("stopping.min_new_tokens", _asking(stopping={"min_new_tokens": 257})),
    ("stopping.stop_sequences", _asking(stopping={"stop_sequences": ["x"] * 10_000})),
    ("stopping.stop_sequences", _asking(stopping={"stop_sequences": [""]})),
    ("stopping.stop_token_ids", _asking(stopping={"stop_token_ids": [1] * 257})),
    ("stopping.time_limit_ms", _asking(stopping={"time_limit_ms": 0})),
    ("response.top_logprobs", _asking(response={"top_logprobs": 101})),
]


async def test_bad_field_is_named_and_never_reaches_the_engine() -> None:
    async with running_server() as server:
        for field, request in BAD_REQUESTS:
            refusal = await refused(server.generation.Generate(request))
            assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "FIELD_INVALID", (field,)), (
                request
            )
            assert (refusal.info.domain, refusal.info.metadata["field"]) == ("manyhats", field)
        assert server.engine.requests == []


BAD_SCORES: list[tuple[str, pb.ScoreRequest]] = [
    ("continuations", pb.ScoreRequest(text="a")),
    ("continuations", pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b")] * 1025)),
    ("continuations", pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="x" * 600_000)] * 2)),
    ("continuations[0]", pb.ScoreRequest(text="a", continuations=[pb.Continuation()])),
    (
        "continuations[1].text",
        pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b"), pb.Continuation(text="")]),
    ),
    (
        "continuations[0].token_ids.ids",
        pb.ScoreRequest(text="a", continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=[999]))]),
    ),
    ("prompt", pb.ScoreRequest(continuations=[pb.Continuation(text="b")])),
]


async def test_bad_field_of_a_scoring_is_named() -> None:
    async with running_server() as server:
        for field, request in BAD_SCORES:
            refusal = await refused(server.generation.Score(request))
            assert (refusal.code, refusal.reason, refusal.fields) == (INVALID, "FIELD_INVALID", (field,)), (
                field
            )
        assert server.engine.score_requests == []


ENGINE_ROWS: list[tuple[Exception, grpc.StatusCode, str]] = [
    (engine_errors.PromptTooLongError("prompt", 70, 64), INVALID, "PROMPT_TOO_LONG"),
    (engine_errors.QueueFullError(9, 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (engine_errors.AdapterCapacityError(4), grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_CAPACITY"),
    (engine_errors.DrainingError("going"), grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    (engine_errors.EngineDeadError("dead"), grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
    (engine_errors.DeadlineExceededError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (engine_errors.RequestCancelledError("gone"), grpc.StatusCode.CANCELLED, "CANCELLED"),
    (engine_errors.NumericalError("NaN"), grpc.StatusCode.INTERNAL, "NUMERICAL_ERROR"),
    (engine_errors.NoMemoryError(), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    (MemoryError("/secret/path"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    (OSError(12, "secret"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: secret"),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OUT_OF_MEMORY",
    ),
    (adapter_errors.DataLossError("hats@1", "is damaged"), grpc.StatusCode.DATA_LOSS, "DATA_LOSS"),
    (RuntimeError("/secret/path"), grpc.StatusCode.INTERNAL, "INTERNAL"),
]


@pytest.mark.parametrize(("error", "code", "reason"), ENGINE_ROWS, ids=lambda value: type(value).__name__)
async def test_fault_of_a_running_request(error: Exception, code: grpc.StatusCode, reason: str) -> None:
    async with running_server() as server:
        server.engine.error = error
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="a")))
        score = pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b")])
        assert (await refused(server.generation.Score(score))).reason == reason
        assert server.engine.running == 0
    assert (refusal.code, refusal.reason) == (code, reason)
    assert "secret" not in refusal.message


PUSHBACKS: list[tuple[Exception, int | None, float | None]] = [
    (engine_errors.QueueFullError(9, 1.5), 1500, 1.5),
    (engine_errors.AdapterCapacityError(4, 0.0001), 1, 0.0001),
    (engine_errors.NoMemoryError(), 1000, 1.0),
    (MemoryError(), 1000, 1.0),
    (engine_errors.DrainingError("going"), 1000, 1.0),
    (adapter_errors.QuotaExceededError("max_uploads", "is 2", 2.0), 2000, 2.0),
    (adapter_errors.QuotaExceededError("max_tasks", "is 2"), -1, None),
    (adapter_errors.StoreFullError("store", "is full"), -1, None),
    (engine_errors.PinLimitError(3, 2, 4), -1, None),
    (engine_errors.StreamUnreadError(60.0), -1, None),
    (engine_errors.NumericalError("NaN"), None, None),
    (RuntimeError("bug"), None, None),
]


@pytest.mark.parametrize(("error", "pushback_ms", "retry_s"), PUSHBACKS, ids=lambda value: repr(value))
async def test_when_to_try_again_is_told_to_people_and_to_grpc(
    error: Exception, pushback_ms: int | None, retry_s: float | None
) -> None:
    async with running_server() as server:
        server.engine.error = error
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="a")))
        assert (refusal.pushback_ms, refusal.retry_s) == (pushback_ms, retry_s)


async def test_no_caller_is_told_to_wait_longer_than_it_can() -> None:
    async with running_server() as server:
        server.engine.error = engine_errors.QueueFullError(9, 5.0)
        for timeout_s, pushback_ms in ((4.0, -1), (60.0, 5000)):
            refusal = await refused(
                server.generation.Generate(pb.GenerateRequest(text="a"), timeout=timeout_s)
            )
            assert (refusal.reason, refusal.pushback_ms, refusal.retry_s) == ("QUEUE_FULL", pushback_ms, 5.0)


async def test_our_client_waits_as_long_as_the_server_says() -> None:
    async with running_server() as server, AsyncClient(server.port.address) as client:
        server.engine.error = engine_errors.QueueFullError(9, 0.3)
        began_s = time.monotonic()
        answer = asyncio.create_task(client.generate("a", max_new_tokens=2))
        await eventually(lambda: num_calls(server, "RESOURCE_EXHAUSTED") == 2)
        server.engine.error = None
        assert (await answer).usage.generated_tokens == 2
        assert 0.6 <= time.monotonic() - began_s < 3.0
        assert (num_calls(server, "RESOURCE_EXHAUSTED"), num_calls(server, "OK")) == (2, 1)
        # Longer than the call may last: the refusal comes at once, with its reason.
        server.engine.error = engine_errors.QueueFullError(9, 30.0)
        began_s = time.monotonic()
        with pytest.raises(QueueFullError):
            await client.generate("a", timeout_s=20)
        assert time.monotonic() - began_s < 3.0


def num_calls(server: Running, code: str) -> float:
    labels = {"task": "_base", "method": "Generate", "code": code}
    return server.metrics.registry.get_sample_value("manyhats_requests_total", labels) or 0.0


async def test_a_text_that_there_is_no_memory_to_read_fails_its_call_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = ByteTokenizer.prompt

    def sometimes(self: ByteTokenizer, text: str, **options: Any) -> Any:
        if text == "too much":
            raise MemoryError
        return read(self, text, **options)

    monkeypatch.setattr(ByteTokenizer, "prompt", sometimes)
    async with running_server() as server:
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="too much")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
        assert refusal.retry_s == 1.0
        assert (await server.generation.Generate(pb.GenerateRequest(text="a"))).text == "a"


async def test_full_queue_says_when_to_come_again() -> None:
    async with running_server() as server:
        server.engine.error = engine_errors.QueueFullError(9, 1.5)
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="a")))
    assert refusal.retry_s == 1.5
    assert refusal.info.metadata["limit"] == "9"


@pytest.mark.parametrize(
    ("error", "retry_s"),
    [
        (engine_errors.QueueFullError(9, 12.5), 12.5),
        (engine_errors.AdapterCapacityError(9, 10.0), 10.0),
        (service_errors.TooManyCallsError(9, 0.25), 0.25),
        (adapter_errors.QuotaExceededError("max_transfers", "are used up", 7.0), 7.0),
        (adapter_errors.QuotaExceededError("max_tasks", "are used up"), None),
        (engine_errors.NoMemoryError(2.5), 2.5),
        (engine_errors.DrainingError("going"), 1.0),
        (engine_errors.EngineDeadError("dead"), 1.0),
        (adapter_errors.StoreUnavailableError("store", "is gone"), 1.0),
        (adapter_errors.StoreFullError("store", "is full"), None),
    ],
)
def test_what_passes_by_itself_says_when_to_come_again(error: Exception, retry_s: float | None) -> None:
    details = status_of(error).details
    found = [retry_of(detail) for detail in details if detail.Is(RetryInfo.DESCRIPTOR)]
    assert found == ([] if retry_s is None else [retry_s])


def retry_of(detail: Any) -> float:
    retry = RetryInfo()
    detail.Unpack(retry)
    return float(retry.retry_delay.ToTimedelta().total_seconds())


async def test_too_long_prompt_says_the_limit() -> None:
    async with running_server() as server:
        server.engine.error = engine_errors.PromptTooLongError("prompt", 70, 64)
        refusal = await refused(server.generation.Generate(pb.GenerateRequest(text="a")))
    assert refusal.fields == ("prompt",)
    assert dict(refusal.info.metadata) == {"field": "prompt", "num_tokens": "70", "limit": "64"}


async def test_unknown_task_and_task_without_active_version() -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a"), activate=False))
        unknown = await refused(server.generation.Generate(pb.GenerateRequest(text="a", task_id="none")))
        version = await refused(server.generation.Generate(pb.GenerateRequest(text="a", task_id="hats@9")))
        inactive = await refused(server.generation.Generate(pb.GenerateRequest(text="a", task_id="hats")))
        served = await server.generation.Generate(pb.GenerateRequest(text="a", task_id="hats@1"))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND")
    assert version.reason == "TASK_NOT_FOUND"
    assert (inactive.code, inactive.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ACTIVE_VERSION")
    assert served.adapter.version == 1


ADAPTER_ROWS: list[tuple[Exception, grpc.StatusCode]] = [
    (adapter_errors.SourceNotFoundError("x", "is missing"), grpc.StatusCode.NOT_FOUND),
    (adapter_errors.SourceNotAllowedError("x", "is outside"), grpc.StatusCode.PERMISSION_DENIED),
    (adapter_errors.AdapterInvalidError("x", "is malformed"), INVALID),
    (adapter_errors.AdapterUnsupportedError("x", "is not served"), INVALID),
    (adapter_errors.AdapterUnsafeError("x", "is a pickle"), INVALID),
    (adapter_errors.AdapterTooLargeError("x", "is too large"), INVALID),
    (adapter_errors.AdapterNoEffectError("x", "changes nothing"), INVALID),
    (adapter_errors.BaseMismatchError("x", "is another base's"), grpc.StatusCode.FAILED_PRECONDITION),
    (adapter_errors.DigestMismatchError("x", "is another"), INVALID),
    (adapter_errors.RequestIdReusedError("x", "was used"), grpc.StatusCode.ALREADY_EXISTS),
    (adapter_errors.StoreFullError("x", "is full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (adapter_errors.QuotaExceededError("x", "is used up"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (adapter_errors.StoreUnavailableError("x", "is gone"), grpc.StatusCode.UNAVAILABLE),
]


@pytest.mark.parametrize(("error", "code"), ADAPTER_ROWS, ids=lambda value: type(value).__name__)
async def test_refused_registration(error: adapter_errors.AdapterError, code: grpc.StatusCode) -> None:
    async with running_server() as server:
        server.store.errors["x"] = error
        request = adapter_pb2.RegisterAdapterRequest(task_id="hats", uri="x")
        refusal = await refused(server.adapters.RegisterAdapter(request))
    assert (refusal.code, refusal.reason) == (code, error.reason)
    assert refusal.info.metadata["subject"] == "x"
    assert refusal.message == str(error)


async def test_everything_is_unavailable_while_loading() -> None:
    async with running_server(is_open=False) as server:
        for call in _one_call_of_each(server):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")


async def test_everything_is_unavailable_while_draining() -> None:
    async with running_server() as server:
        server.gate.drain()
        for call in _one_call_of_each(server):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_everything_is_unavailable_once_the_engine_is_dead() -> None:
    async with running_server() as server:
        server.engine.is_alive = False
        for call in _one_call_of_each(server):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")


async def test_message_over_the_size_limit_is_refused() -> None:
    async with running_server() as server:
        request = pb.GenerateRequest(text="x" * (9 * 1024 * 1024))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.generation.Generate(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def _one_call_of_each(server: Running) -> list[Awaitable[Any]]:
    return [
        server.generation.Generate(pb.GenerateRequest(text="a")),
        server.generation.GenerateStream(pb.GenerateRequest(text="a")).read(),
        server.generation.Score(pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b")])),
        server.generation.Tokenize(pb.TokenizeRequest(text="a")),
        server.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest()),
        server.server.GetServerInfo(server_pb2.GetServerInfoRequest()),
    ]
