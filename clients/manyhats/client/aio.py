"""The asyncio client. Its twin is ``sync.py``; they share everything that does not talk to the network."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc.aio
from grpc_health.v1 import health_pb2

from manyhats.client import adapter_convert, convert, encoding_convert
from manyhats.client.aio_many import AsyncManyCalls
from manyhats.client.aio_stream import AsyncGenerationStream
from manyhats.client.channel import DEFAULT_TARGET, carrying, open_aio_channel, task_metadata
from manyhats.client.credentials import Credentials
from manyhats.client.encoding_results import ClassifyResult, Embeddings, RerankResult, TagResult
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
from manyhats.client.status import error_from_call
from manyhats.client.upload import ACCEPTED, UploadMessages, read_files
from manyhats.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    encoding_pb2_grpc,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

Response = TypeVar("Response")


class AsyncClient(AsyncManyCalls):
    """Talks to a manyhats server from asyncio; close it, or use it as an async context manager.

    Create it inside a running event loop, and use it only in that loop.

    Every call takes ``timeout_s``, the seconds after which it fails with ``DeadlineError``; None means no limit. Every
    call raises subclasses of ``ManyhatsError``.

        async with AsyncClient("127.0.0.1:50051") as client:
            print((await client.generate("List all users.", task_id="sql", max_new_tokens=64)).text)

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
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._retries = retries
        self._own_channel: grpc.aio.Channel | None = None
        if channel is None:
            channel = self._own_channel = open_aio_channel(target, credentials, retries=retries)
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

    async def close(self) -> None:
        """End running calls and close the connection, unless the channel is the caller's."""
        if self._own_channel is not None:
            await self._own_channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Generation.

    async def generate(
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
        return convert.generation(await self._call(self._generation.Generate, request, timeout_s))

    def generate_stream(
        self,
        prompt: Prompt,
        *,
        task_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """Generate one answer and stream it; arguments as for ``generate``."""
        request = convert.generate_request(prompt, task_id, options)
        call = self._generation.GenerateStream(request, timeout=self._timeout(timeout_s))
        return AsyncGenerationStream(call, self._target)

    async def score(
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
        return convert.score_result(await self._call(self._generation.Score, request, timeout_s))

    async def tokenize(
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
        return convert.tokenization(await self._call(self._generation.Tokenize, request, timeout_s))

    # Encoding.

    async def embed(
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
        return encoding_convert.embeddings(await self._call(self._encoding.Embed, request, timeout_s))

    async def classify(
        self,
        texts: Iterable[TextToRead],
        *,
        task_id: str | Sequence[str],
        timeout_s: float | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> ClassifyResult:
        """Return the classes of each text by a task with a head, or by each of several; otherwise as ``embed``."""
        request = encoding_convert.classify_request(texts, task_id, options)
        return encoding_convert.classify_result(await self._call(self._encoding.Classify, request, timeout_s))

    async def tag(
        self,
        texts: Iterable[str],
        *,
        task_id: str,
        timeout_s: float | None = None,
        **options: Unpack[TagOptions],
    ) -> TagResult:
        """Return the entities in each text, or the classes of its tokens, by a task with a head for tokens."""
        request = encoding_convert.tag_request(texts, task_id, options)
        return encoding_convert.tag_result(
            await self._call(self._encoding.ClassifyTokens, request, timeout_s)
        )

    async def rerank(
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
        return encoding_convert.rerank_result(await self._call(self._encoding.Rerank, request, timeout_s))

    # Adapters.

    async def register_adapter(
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
        response = await self._call(self._adapters.RegisterAdapter, request, timeout_s)
        return adapter_convert.registration(response)

    async def upload_adapter(
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
        files = await asyncio.to_thread(read_files, directory)
        header = adapter_convert.upload_header(task_id, [file.info for file in files], options)
        with shown(progress, "upload", in_bytes=True) as report:
            messages = UploadMessages(header, files, report)
            call = self._adapters.UploadAdapter(
                timeout=self._timeout(timeout_s), metadata=task_metadata(header)
            )
            try:
                await _send(call, messages)
                return adapter_convert.registration(await call)
            except grpc.aio.AioRpcError as error:
                raise messages.failure or error_from_call(error, self._target) from error
            finally:
                call.cancel()  # does nothing if it has ended

    async def get_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Describe a task's active version, or the version that ``task@3`` names."""
        request = adapter_pb2.GetAdapterRequest(task_id=task_id)
        response = await self._call(self._adapters.GetAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    async def list_adapters(
        self, *, task_id: str = "", page_size: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[AdapterInfo]:
        """Iterate over all versions, of one task or of every task, ordered by task id and version.

        Pages are fetched as the iteration needs them; ``timeout_s`` is for each.
        A ``page_size`` of 0 leaves it to the server.
        """
        request = adapter_convert.list_request(task_id, page_size)
        while True:
            response = await self._call(self._adapters.ListAdapters, request, timeout_s)
            for adapter in response.adapters:
                yield adapter_convert.adapter_info(adapter)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def activate_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Move a task to the version that ``task@3`` names, forward or back, and describe it.

        Running requests finish on the version they began on.
        """
        request = adapter_pb2.ActivateAdapterRequest(task_id=task_id)
        response = await self._call(self._adapters.ActivateAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    async def pin_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Keep the version ``task@3`` in memory, or with ``task`` whichever is active, and describe it.

        It is loaded first, also whenever a server starts. What would not fit in the memory for adapters is refused.
        """
        request = adapter_pb2.PinAdapterRequest(task_id=task_id)
        response = await self._call(self._adapters.PinAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    async def unpin_adapter(self, task_id: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Let the version ``task@3`` leave memory again, or all that is pinned of ``task``, and describe it."""
        request = adapter_pb2.UnpinAdapterRequest(task_id=task_id)
        response = await self._call(self._adapters.UnpinAdapter, request, timeout_s)
        return adapter_convert.adapter_info(response.adapter)

    async def delete_adapter(
        self, task_id: str, *, force: bool = False, timeout_s: float | None = None
    ) -> tuple[AdapterInfo, ...]:
        """Delete one version (``task@3``) or a task with all of its versions, and return what was deleted.

        ``force`` deletes versions in use, too; requests running on them finish on what they have.
        """
        request = adapter_pb2.DeleteAdapterRequest(task_id=task_id, force=force)
        response = await self._call(self._adapters.DeleteAdapter, request, timeout_s)
        return tuple(map(adapter_convert.adapter_info, response.adapters))

    # Server.

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describe the server and its base model."""
        request = server_pb2.GetServerInfoRequest()
        return convert.server_info(await self._call(self._server.GetServerInfo, request, timeout_s))

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as the server would serve a request.

        Raises:
            UnavailableError: it did not get there in time.
        """
        wait = ReadinessWait(self._target, timeout_s)
        request = health_pb2.HealthCheckRequest()
        while True:
            try:
                response = await self._check_health(request, timeout=wait.remaining_s, wait_for_ready=True)
                if wait.is_ready(response):
                    return
            except grpc.aio.AioRpcError as error:
                if not wait.is_temporary(error.code()):
                    raise error_from_call(error, self._target) from error
            wait.raise_if_over()
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _call(
        self, method: Callable[..., Awaitable[Response]], request: Any, timeout_s: float | None
    ) -> Response:
        try:
            return await method(request, timeout=self._timeout(timeout_s))
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self._target) from error

    def _without_retries(self) -> AbstractAsyncContextManager[AsyncClient]:
        """A client of the same server whose calls are tried once; this one, where that is so or the caller's affair."""
        if self._own_channel is None or not self._retries:
            return nullcontext(self)
        return AsyncClient(
            self._target, timeout_s=self._timeout_s, credentials=self._credentials, retries=False
        )

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


async def _send(call: Any, messages: UploadMessages) -> None:
    """Write all messages, each read in a worker thread; if the server ends the call early, awaiting it says why."""
    remaining = iter(messages)
    try:
        await call.write(next(remaining))
        # A write that meets the end of its call loses the call's status, so nothing is sent while the server may still
        # refuse.
        if ACCEPTED in tuple(await call.initial_metadata()):
            while (message := await asyncio.to_thread(next, remaining, None)) is not None:
                await call.write(message)
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        return
