"""The blocking client. Its twin is ``aio.py``; they share everything that does not talk to the network."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
from grpc_health.v1 import health_pb2

from manyhats.client import adapter_convert, convert, encoding_convert
from manyhats.client.aio import AsyncClient
from manyhats.client.channel import DEFAULT_TARGET, carrying, open_channel, task_metadata
from manyhats.client.credentials import Credentials
from manyhats.client.encoding_results import ClassifyResult, Embeddings, RerankResult, TagResult
from manyhats.client.errors import ManyhatsError
from manyhats.client.fields import invalid
from manyhats.client.own_loop import run_beside
from manyhats.client.progress import shown
from manyhats.client.readiness import HEALTH_CHECK_METHOD, POLL_INTERVAL_S, ReadinessWait
from manyhats.client.requests import (
    ChatOptions,
    ClassifyOptions,
    Continuation,
    EmbedOptions,
    GenerateOptions,
    Progress,
    Prompt,
    PromptOptions,
    RegisterOptions,
    RerankOptions,
    TagOptions,
    TextToRead,
)
from manyhats.client.results import (
    AdapterInfo,
    Generation,
    Registration,
    ScoreResult,
    ServerInfo,
    Tokenization,
)
from manyhats.client.status import FailedCall, error_from_call
from manyhats.client.stream import GenerationStream, StreamCall
from manyhats.client.sync_many import ManyCalls
from manyhats.client.upload import UploadMessages, read_files
from manyhats.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    encoding_pb2_grpc,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

Response = TypeVar("Response")


class Client(ManyCalls):
    """Talks to a manyhats server. Thread-safe; close it, or use it as a context manager.

    Every call takes ``timeout_s``, the seconds after which it fails with ``DeadlineError``; None means no limit. Every
    call raises subclasses of ``ManyhatsError``.

        with Client("127.0.0.1:50051") as client:
            print(client.generate("List all users.", task_id="sql", max_new_tokens=64).text)

    Args:
        target: ``host:port`` of the server, or any target gRPC understands.
        timeout_s: the default for calls.
        credentials: for a server that requires TLS or a token; none by default.
        retries: whether calls that were refused for now, or found no server, are tried again, up to three times and
            within their ``timeout_s``, when the server says or after 0.2 s, 0.4 s and 0.8 s.
        channel: an open channel to use instead of ``target``, with retries of its own; the caller still closes it.

    Raises:
        CredentialsError: the credentials cannot be used, or would leave this machine unencrypted.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float | None = None,
        credentials: Credentials | None = None,
        retries: bool = True,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._own_channel: grpc.Channel | None = None
        if channel is None:
            channel = self._own_channel = open_channel(target, credentials, retries=retries)
        else:
            channel = carrying(channel)
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._encoding = encoding_pb2_grpc.EncodingServiceStub(channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self._server = server_pb2_grpc.ServerServiceStub(channel)
        self._check_health = channel.unary_unary(
            HEALTH_CHECK_METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def close(self) -> None:
        """End running calls and close the connection, unless the channel is the caller's."""
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
        """Generate one answer and wait for all of it.

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
        """Generate one answer and stream it; arguments as for ``generate``."""
        request = convert.generate_request(prompt, task_id, options)
        call = self._generation.GenerateStream(request, timeout=self._timeout(timeout_s))
        return GenerationStream(cast(StreamCall, call), self._target)

    def score(
        self,
        prompt: Prompt,
        continuations: Iterable[Continuation],
        *,
        task_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[PromptOptions],
    ) -> ScoreResult:
        """Return the log-probability of each continuation after the prompt, which is computed once."""
        request = convert.score_request(prompt, continuations, task_id, options)
        return convert.score_result(self._call(self._generation.Score, request, timeout_s))

    def tokenize(
        self,
        prompt: Prompt,
        *,
        task_id: str = "",
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Tokenization:
        """Return the tokens the prompt becomes; computes nothing on the model."""
        request = convert.tokenize_request(prompt, task_id, add_special_tokens, options)
        return convert.tokenization(self._call(self._generation.Tokenize, request, timeout_s))

    # Encoding.

    def embed(
        self,
        texts: Iterable[TextToRead],
        *,
        task_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Return a vector of each text.

        Args:
            texts: each a text, a pair of texts, token ids, or a conversation.
            task_id: ``task`` for its active version, ``task@3`` for that version, empty for the base model.
            timeout_s: as above.
            options: see ``EmbedOptions``.
        """
        request = encoding_convert.embed_request(texts, task_id, options)
        return encoding_convert.embeddings(self._call(self._encoding.Embed, request, timeout_s))

    def classify(
        self,
        texts: Iterable[TextToRead],
        *,
        task_id: str | Sequence[str],
        timeout_s: float | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> ClassifyResult:
        """Return the classes of each text by a task with a head, or by each of several; otherwise as ``embed``."""
        request = encoding_convert.classify_request(texts, task_id, options)
        return encoding_convert.classify_result(self._call(self._encoding.Classify, request, timeout_s))

    def tag(
        self,
        texts: Iterable[str],
        *,
        task_id: str,
        timeout_s: float | None = None,
        **options: Unpack[TagOptions],
    ) -> TagResult:
        """Return the entities in each text, or the classes of its tokens, by a task with a head for tokens."""
        request = encoding_convert.tag_request(texts, task_id, options)
        return encoding_convert.tag_result(self._call(self._encoding.ClassifyTokens, request, timeout_s))

    def rerank(
        self,
        query: str,
        texts: Iterable[str],
        *,
        task_id: str,
        timeout_s: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> RerankResult:
        """Return the texts by their relevance to the query, by a task whose head has one class."""
        request = encoding_convert.rerank_request(query, texts, task_id, options)
        return encoding_convert.rerank_result(self._call(self._encoding.Rerank, request, timeout_s))

    # Adapters.

    def register_adapter(
        self,
        task_id: str,
        uri: str = "",
        *,
        parts: Iterable[tuple[str, float]] = (),
        timeout_s: float | None = None,
        **options: Unpack[RegisterOptions],
    ) -> Registration:
        """Register an adapter that the server can read as a version of a task.

        Args:
            task_id: the task, without a version.
            uri: a path under one of the server's allowed roots, or a URL that it allows.
            parts: of a composed task, instead of ``uri``: each part's uri, and what its deltas are scaled by.
            timeout_s: as above.
            options: see ``RegisterOptions``.
        """
        request = adapter_convert.register_request(task_id, uri, parts, options)
        return adapter_convert.registration(self._call(self._adapters.RegisterAdapter, request, timeout_s))

    def upload_adapter(
        self,
        task_id: str,
        directory: str | os.PathLike[str],
        *,
        progress: Progress | bool | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RegisterOptions],
    ) -> Registration:
        """Send an adapter's directory, and make it a version of a task; otherwise as ``register_adapter``.

        It is safe to repeat. An upload that fails, at whatever point, leaves nothing on the server.

        Args:
            task_id: the task, without a version.
            directory: on this machine; its ``adapter_config.json``, safetensors and text files are sent, nothing else.
            progress: called with the bytes sent and their total, on another thread; True shows a bar.
            timeout_s: as above.
            options: see ``RegisterOptions``.
        """
        files = read_files(directory)
        header = adapter_convert.upload_header(task_id, [file.info for file in files], options)
        with shown(progress, "upload", in_bytes=True) as report:
            messages = UploadMessages(header, files, report)
            upload = partial(self._adapters.UploadAdapter, metadata=task_metadata(header))
            try:
                response = self._call(upload, iter(messages), timeout_s)
            except ManyhatsError:
                if messages.failure is not None:
                    raise messages.failure from None
                raise
        return adapter_convert.registration(response)

    def get_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Describe a task's active version, or the version that ``task@3`` names."""
        request = adapter_pb2.GetAdapterRequest(task_id=task_id)
        return adapter_convert.adapter_info(self._call(self._adapters.GetAdapter, request, timeout_s).adapter)

    def list_adapters(
        self, *, task_id: str = "", page_size: int = 0, timeout_s: float | None = None
    ) -> Iterator[AdapterInfo]:
        """Iterate over all versions, of one task or of every task, ordered by task id and version.

        Pages are fetched as the iteration needs them; ``timeout_s`` is for each.
        A ``page_size`` of 0 leaves it to the server.
        """
        request = adapter_convert.list_request(task_id, page_size)
        while True:
            response = self._call(self._adapters.ListAdapters, request, timeout_s)
            yield from map(adapter_convert.adapter_info, response.adapters)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def activate_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Move a task to the version that ``task@3`` names, forward or back, and describe it.

        Running requests finish on the version they began on.
        """
        request = adapter_pb2.ActivateAdapterRequest(task_id=task_id)
        response = self._call(self._adapters.ActivateAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    def pin_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Keep the version ``task@3`` in memory, or with ``task`` whichever is active, and describe it.

        It is loaded first, also whenever a server starts. What would not fit in the memory for adapters is refused.
        """
        request = adapter_pb2.PinAdapterRequest(task_id=task_id)
        response = self._call(self._adapters.PinAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    def unpin_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Let the version ``task@3`` leave memory again, or all that is pinned of ``task``, and describe it."""
        request = adapter_pb2.UnpinAdapterRequest(task_id=task_id)
        response = self._call(self._adapters.UnpinAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    def delete_adapter(
        self, task_id: str, *, force: bool = False, timeout_s: float | None = None
    ) -> tuple[AdapterInfo, ...]:
        """Delete one version (``task@3``) or a task with all of its versions, and return what was deleted.

        ``force`` deletes versions in use, too; requests running on them finish on what they have.
        """
        request = adapter_pb2.DeleteAdapterRequest(task_id=task_id, force=force)
        response = self._call(self._adapters.DeleteAdapter, request, timeout_s)
        return tuple(map(adapter_convert.adapter_info, response.adapters))

    # Server.

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describe the server and its base model."""
        request = server_pb2.GetServerInfoRequest()
        return convert.server_info(self._call(self._server.GetServerInfo, request, timeout_s))

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as the server would serve a request.

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

    def _run(self, ask: Callable[[AsyncClient], Coroutine[Any, Any, Response]]) -> Response:
        if self._own_channel is None:
            raise invalid(
                "channel", "calls for many prompts open their own; give the client a target instead"
            )

        async def work() -> Response:
            async with AsyncClient(
                self._target, timeout_s=self._timeout_s, credentials=self._credentials, retries=False
            ) as client:
                return await ask(client)

        return run_beside(work())

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s
