"""Every status of the API becomes its exception, from both clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from manyhats import client as public
from manyhats.client import AsyncClient, AsyncGenerationStream, Client, ManyhatsError
from support.fakes.client import FakeServer, make_status

CODE = grpc.StatusCode


@dataclass(frozen=True)
class Case:
    code: grpc.StatusCode
    reason: str
    error: type[ManyhatsError]
    extra: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(CODE.INVALID_ARGUMENT, "FIELD_INVALID", public.InvalidRequestError),
    Case(CODE.INVALID_ARGUMENT, "PROMPT_TOO_LONG", public.PromptTooLongError),
    Case(CODE.ALREADY_EXISTS, "REQUEST_ID_REUSED", public.RequestIdReusedError),
    Case(CODE.NOT_FOUND, "TASK_NOT_FOUND", public.TaskNotFoundError),
    Case(CODE.INVALID_ARGUMENT, "ADAPTER_INVALID", public.AdapterInvalidError),
    Case(CODE.INVALID_ARGUMENT, "ADAPTER_UNSUPPORTED", public.AdapterUnsupportedError),
    Case(CODE.INVALID_ARGUMENT, "ADAPTER_UNSAFE", public.AdapterUnsafeError),
    Case(CODE.INVALID_ARGUMENT, "ADAPTER_TOO_LARGE", public.AdapterTooLargeError),
    Case(CODE.INVALID_ARGUMENT, "ADAPTER_NO_EFFECT", public.AdapterNoEffectError),
    Case(CODE.FAILED_PRECONDITION, "ADAPTER_IN_USE", public.AdapterInUseError),
    Case(CODE.FAILED_PRECONDITION, "BASE_MISMATCH", public.BaseMismatchError),
    Case(CODE.FAILED_PRECONDITION, "NO_ACTIVE_VERSION", public.NoActiveVersionError),
    Case(CODE.FAILED_PRECONDITION, "TASK_KIND_MISMATCH", public.TaskKindError),
    Case(CODE.NOT_FOUND, "SOURCE_NOT_FOUND", public.SourceNotFoundError),
    Case(CODE.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED", public.SourceNotAllowedError),
    Case(CODE.INVALID_ARGUMENT, "DIGEST_MISMATCH", public.DigestMismatchError),
    Case(CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", public.QueueFullError),
    Case(CODE.RESOURCE_EXHAUSTED, "STORE_FULL", public.ResourceExhaustedError),
    Case(CODE.UNAVAILABLE, "LOADING", public.UnavailableError),
    Case(CODE.UNAVAILABLE, "DRAINING", public.UnavailableError),
    Case(CODE.INTERNAL, "NUMERICAL_ERROR", public.NumericalError),
    Case(CODE.INTERNAL, "INTERNAL", public.ServerError),
    Case(CODE.DATA_LOSS, "DATA_LOSS", public.DataLossError),
    Case(CODE.UNIMPLEMENTED, "NOT_OFFERED", public.NotOfferedError),
    # Without a reason, as proxies and gRPC itself answer, the code decides.
    Case(CODE.INVALID_ARGUMENT, "", public.InvalidRequestError),
    Case(CODE.OUT_OF_RANGE, "", public.InvalidRequestError),
    Case(CODE.NOT_FOUND, "", public.TaskNotFoundError),
    Case(CODE.FAILED_PRECONDITION, "", public.AdapterError),
    Case(CODE.RESOURCE_EXHAUSTED, "", public.ResourceExhaustedError),
    Case(CODE.UNAVAILABLE, "", public.UnavailableError),
    Case(CODE.DEADLINE_EXCEEDED, "", public.DeadlineError),
    Case(CODE.UNAUTHENTICATED, "", public.AuthenticationError),
    Case(CODE.PERMISSION_DENIED, "", public.PermissionDeniedError),
    Case(CODE.UNKNOWN, "", public.ServerError),
    Case(CODE.INTERNAL, "A_REASON_OF_TOMORROW", public.ServerError),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code.name}-{case.reason}")
async def test_status_becomes_its_exception(fake: FakeServer, case: Case) -> None:
    fake.status = make_status(case.code, "what went wrong", reason=case.reason, metadata={"limit": "8192"})
    raised: list[ManyhatsError] = []
    with Client(fake.target, retries=False) as client:
        with pytest.raises(ManyhatsError) as caught:
            client.generate("hi")
        raised.append(caught.value)
        with pytest.raises(ManyhatsError) as caught:
            client.generate_stream("hi").result()
        raised.append(caught.value)
    async with AsyncClient(fake.target, retries=False) as aclient:
        with pytest.raises(ManyhatsError) as caught:
            await aclient.generate("hi")
        raised.append(caught.value)
        with pytest.raises(ManyhatsError) as caught:
            await aclient.generate_stream("hi").result()
        raised.append(caught.value)
    for error in raised:
        assert type(error) is case.error
        assert (error.code, error.reason) == (case.code.name, case.reason)
        assert "what went wrong" in str(error)
        assert dict(error.metadata) == ({"limit": "8192"} if case.reason else {})


@pytest.mark.parametrize("code", [CODE.CANCELLED])
def test_cancelled_by_the_server(fake: FakeServer, code: grpc.StatusCode) -> None:
    fake.status = make_status(code, "gone")
    with Client(fake.target) as client, pytest.raises(public.CancelledError):
        client.generate("hi")


def test_every_exception_is_reached() -> None:
    tree = {
        error
        for error in vars(public).values()
        if isinstance(error, type) and issubclass(error, ManyhatsError)
    }
    assert tree - {case.error for case in CASES} == {
        ManyhatsError,
        public.CancelledError,
        public.CredentialsError,
    }


def test_bad_fields_are_named(fake: FakeServer) -> None:
    fake.status = make_status(
        CODE.INVALID_ARGUMENT,
        "two fields are wrong",
        reason="FIELD_INVALID",
        fields={"sampling.top_p": "must be in (0, 1]", "prompt": "is empty"},
    )
    with Client(fake.target) as client, pytest.raises(public.InvalidRequestError) as caught:
        client.generate("")
    assert caught.value.field == "sampling.top_p"
    assert dict(caught.value.violations) == {"sampling.top_p": "must be in (0, 1]", "prompt": "is empty"}


def test_field_may_come_in_the_metadata_alone(fake: FakeServer) -> None:
    fake.status = make_status(
        CODE.INVALID_ARGUMENT,
        "too long",
        reason="PROMPT_TOO_LONG",
        metadata={"field": "prompt", "limit": "5"},
    )
    with Client(fake.target) as client, pytest.raises(public.PromptTooLongError) as caught:
        client.generate("x")
    assert caught.value.field == "prompt"


def test_full_queue_says_when_to_try_again(fake: FakeServer) -> None:
    fake.status = make_status(CODE.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after_s=1.5)
    with Client(fake.target, retries=False) as client, pytest.raises(public.QueueFullError) as caught:
        client.generate("x")
    assert caught.value.retry_after_s == 1.5


def test_adapter_error_names_its_subject(fake: FakeServer) -> None:
    fake.status = make_status(
        CODE.INVALID_ARGUMENT, "a pickle", reason="ADAPTER_UNSAFE", metadata={"subject": "adapter_model.bin"}
    )
    with Client(fake.target) as client, pytest.raises(public.AdapterUnsafeError) as caught:
        client.register_adapter("sql", "/adapters/sql")
    assert caught.value.subject == "adapter_model.bin"


async def collect(stream: AsyncGenerationStream, pieces: list[str]) -> None:
    async for chunk in stream:
        pieces.append(chunk.text)


async def test_failure_in_mid_stream_comes_after_the_pieces_before_it(fake: FakeServer) -> None:
    fake.status = make_status(CODE.INTERNAL, "non-finite logits", reason="NUMERICAL_ERROR")
    fake.fail_stream_after = 2
    pieces: list[str] = []
    with Client(fake.target) as client, client.generate_stream("hi") as stream:
        with pytest.raises(public.NumericalError):
            pieces.extend(chunk.text for chunk in stream)
        assert list(stream) == []
    async with AsyncClient(fake.target) as aclient, aclient.generate_stream("hi") as astream:
        with pytest.raises(public.NumericalError):
            await collect(astream, pieces)
        assert [chunk async for chunk in astream] == []
    assert pieces[2:] == ["Hello", ", "]


async def test_deadline(fake: FakeServer) -> None:
    fake.delay_s = 0.5
    with Client(fake.target, timeout_s=0.05) as client, pytest.raises(public.DeadlineError):
        client.generate("hi")
    async with AsyncClient(fake.target) as aclient:
        with pytest.raises(public.DeadlineError):
            await aclient.generate("hi", timeout_s=0.05)


async def test_unreachable_server_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(public.UnavailableError, match=r"127\.0\.0\.1:1"):
        client.server_info()
    async with AsyncClient("127.0.0.1:1") as aclient:
        with pytest.raises(public.UnavailableError, match=r"127\.0\.0\.1:1"):
            await aclient.server_info()
