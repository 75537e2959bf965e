"""The blocking client. Its twin is ``aio.py``; they share ``convert``, ``status`` and ``readiness``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, Unpack, cast

import grpc
from grpc_health.v1 import health_pb2

from manyhats.client import convert
from manyhats.client.channel import CHANNEL_OPTIONS, DEFAULT_TARGET
from manyhats.client.readiness import HEALTH_CHECK_METHOD, POLL_INTERVAL_S, ReadinessWait
from manyhats.client.requests import Continuation, GenerateOptions, Prompt, PromptOptions
from manyhats.client.results import (
    AdapterInfo,
    Generation,
    GenerationChunk,
    Registration,
    ScoreResult,
    ServerInfo,
    Tokenization,
)
from manyhats.client.status import FailedCall, error_from_call
from manyhats.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

Response = TypeVar("Response")


class _StreamCall(Protocol):
    """A running server-streaming call."""

    def __next__(self) -> generation_pb2.GenerateStreamResponse: ...

    def cancel(self) -> bool: ...


class GenerationStream:
    """A streamed answer: iterate it for the pieces, or take the whole with ``result``.

    Use it as a context manager, or call ``close``: leaving it early cancels the request on the server.
    It is for one thread; only ``close`` may come from another.
    """

    def __init__(self, call: _StreamCall, target: str) -> None:
        self._call = call
        self._target = target
        self._chunks: list[GenerationChunk] = []
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationChunk:
        if self._is_closed:
            raise StopIteration
        try:
            response = next(self._call)
        except StopIteration:
            self._is_closed = True
            raise
        except grpc.RpcError as error:
            if self._is_closed:
                raise StopIteration from None
            self._is_closed = True
            raise error_from_call(cast(FailedCall, error), self._target) from error
        self._chunks.append(convert.generation_chunk(response))
        return self._chunks[-1]

    def result(self) -> Generation:
        """The answer: reads what is left of the stream, and joins all pieces.

        After an early ``close`` it is what came until then, with ``FinishReason.UNSPECIFIED``.
        """
        for _ in self:
            pass
        return convert.join_chunks(self._chunks)

    def close(self) -> None:
        """Cancels the request if it still runs; harmless otherwise."""
        self._is_closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """Talks to a manyhats server. Thread-safe; close it, or use it as a context manager.

    Every call takes ``timeout_s``, the seconds after which it fails with ``DeadlineError``; None waits as
    long as it takes. Every call raises subclasses of ``ManyhatsError``.

        with Client("127.0.0.1:50051") as client:
            print(client.generate("List all users.", task_id="sql", max_new_tokens=64).text)

    Args:
        target: ``host:port`` of the server, or any target gRPC understands.
        timeout_s: for calls that name none.
        channel: an open channel to use in place of ``target``; it stays the caller's to close.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._own_channel: grpc.Channel | None = None
        if channel is None:
            channel = self._own_channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self._server = server_pb2_grpc.ServerServiceStub(channel)
        self._check_health = channel.unary_unary(
            HEALTH_CHECK_METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def close(self) -> None:
        """Ends running calls and closes the connection, unless the channel is the caller's."""
        if self._own_channel is not None:
            self._own_channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Generation.

    def generate(
        self,
        prompt: Prompt,
        *,
        task_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Generates one answer and waits for all of it.

        Args:
            prompt: text, token ids, or a conversation.
            task_id: ``task`` for its active version, ``task@3`` for that version, empty for the base model.
            timeout_s: as above.
            options: see ``GenerateOptions``.
        """
        request = convert.generate_request(prompt, task_id, options)
        return convert.generation(self._call(self._generation.Generate, request, timeout_s))

    def generate_stream(
        self,
        prompt: Prompt,
        *,
        task_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """Generates one answer and gives it as it grows; arguments as of ``generate``."""
        request = convert.generate_request(prompt, task_id, options)
        call = self._generation.GenerateStream(request, timeout=self._timeout(timeout_s))
        return GenerationStream(cast(_StreamCall, call), self._target)

    def score(
        self,
        prompt: Prompt,
        continuations: Iterable[Continuation],
        *,
        task_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[PromptOptions],
    ) -> ScoreResult:
        """Gives the log-probability of each continuation after the prompt, which is computed once."""
        request = convert.score_request(prompt, continuations, task_id, options)
        return convert.score_result(self._call(self._generation.Score, request, timeout_s))

    def tokenize(
        self,
        prompt: Prompt,
        *,
        task_id: str = "",
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> Tokenization:
        """Gives the tokens the prompt becomes; computes nothing on the model."""
        request = convert.tokenize_request(prompt, task_id, add_special_tokens)
        return convert.tokenization(self._call(self._generation.Tokenize, request, timeout_s))

    # Adapters.

    def register_adapter(
        self,
        task_id: str,
        uri: str,
        *,
        activate: bool = True,
        validate_only: bool = False,
        expected_digest: str = "",
        request_id: str = "",
        labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Registration:
        """Makes the adapter at a path of the server's a version of a task.

        Args:
            task_id: the task, without a version.
            uri: a path under one of the server's allowed roots.
            activate: whether the new version becomes the one the bare task id means.
            validate_only: checks everything and stores nothing.
            expected_digest: ``sha256:…`` the files must have; empty for any.
            request_id: makes a repeat safe; the same id with another body is refused.
            labels: kept with the version.
            timeout_s: as above.
        """
        request = convert.register_request(
            task_id,
            uri,
            activate=activate,
            validate_only=validate_only,
            expected_digest=expected_digest,
            request_id=request_id,
            labels=labels,
        )
        return convert.registration(self._call(self._adapters.RegisterAdapter, request, timeout_s))

    def get_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Describes a task's active version, or the version that ``task@3`` names."""
        request = adapter_pb2.GetAdapterRequest(task_id=task_id)
        return convert.adapter_info(self._call(self._adapters.GetAdapter, request, timeout_s).adapter)

    def list_adapters(
        self, *, task_id: str = "", page_size: int = 0, timeout_s: float | None = None
    ) -> Iterator[AdapterInfo]:
        """Iterates over all versions, of one task or of every one, ordered by task id and version.

        Pages are fetched as the iteration needs them; ``timeout_s`` is for each.
        A ``page_size`` of 0 leaves it to the server.
        """
        request = convert.list_request(task_id, page_size)
        while True:
            response = self._call(self._adapters.ListAdapters, request, timeout_s)
            yield from map(convert.adapter_info, response.adapters)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def delete_adapter(
        self, task_id: str, *, force: bool = False, timeout_s: float | None = None
    ) -> tuple[AdapterInfo, ...]:
        """Deletes one version (``task@3``) or a task with all of its versions, and gives what was deleted.

        ``force`` deletes versions in use, too; requests that run on them finish on what they have.
        """
        request = adapter_pb2.DeleteAdapterRequest(task_id=task_id, force=force)
        response = self._call(self._adapters.DeleteAdapter, request, timeout_s)
        return tuple(map(convert.adapter_info, response.adapters))

    # Server.

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describes the server and its base model."""
        request = server_pb2.GetServerInfoRequest()
        return convert.server_info(self._call(self._server.GetServerInfo, request, timeout_s))

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns as soon as the server would serve a request.

        Raises:
            UnavailableError: it did not get there in time.
        """
        wait = ReadinessWait(self._target, timeout_s)
        request = health_pb2.HealthCheckRequest()
        while True:
            try:
                response = self._check_health(request, timeout=wait.remaining_s, wait_for_ready=True)
                if wait.is_ready(response):
                    return
            except grpc.RpcError as error:
                failed = cast(FailedCall, error)
                if not wait.is_temporary(failed.code()):
                    raise error_from_call(failed, self._target) from error
            wait.raise_if_over()
            time.sleep(POLL_INTERVAL_S)

    def _call(self, method: Callable[..., Response], request: Any, timeout_s: float | None) -> Response:
        try:
            return method(request, timeout=self._timeout(timeout_s))
        except grpc.RpcError as error:
            raise error_from_call(cast(FailedCall, error), self._target) from error

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s
