# ruff: noqa: N802 - the methods have the names of the API
"""A manyhats server with canned answers, over a real port, for the tests of the client and the CLI."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from manyhats.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    encoding_pb2,
    encoding_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

PIECES = ("Hello", ", ", "wörld", "!")
TEXT = "".join(PIECES)
CREATE_TIME = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def make_status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    metadata: dict[str, str] | None = None,
    fields: dict[str, str] | None = None,
    retry_after_s: float | None = None,
) -> Any:
    """A ``google.rpc.Status`` as the server's table makes them."""
    details: list[Message] = []
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain="manyhats", metadata=metadata or {}))
    if fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
            for field, description in fields.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(retry)
    packed = [AnyMessage() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def make_adapter(task_id: str, version: int) -> adapter_pb2.Adapter:
    """A version as a server would describe it."""
    adapter = adapter_pb2.Adapter(
        task_id=task_id,
        version=version,
        digest=f"sha256:{version:064x}",
        method=adapter_pb2.ADAPTER_METHOD_LORA,
        state=adapter_pb2.ADAPTER_STATE_ACTIVE,
        size_bytes=1_234_567,
        num_parameters=300_000,
        source=f"/adapters/{task_id}",
        base_model="tiny-base",
        labels={"team": "a"},
        effect=0.25,
        residency=adapter_pb2.ADAPTER_RESIDENCY_DEVICE,
        notes=["names no base"],
        parts=[adapter_pb2.ArtifactPart(digest="sha256:aa", weight=0.5, source=f"/adapters/{task_id}")],
        kind=adapter_pb2.TASK_KIND_CLASSIFY,
        class_labels=["good", "bad"],
        pooling=adapter_pb2.POOLING_LAST,
    )
    adapter.create_time.FromDatetime(CREATE_TIME)
    return adapter


class FakeServer:
    """What the servicers answer, and what they saw.

    ``status`` fails every call, or the first ``num_failures``; ``is_endless`` never ends a stream.
    """

    def __init__(self) -> None:
        self.target = ""
        self.requests: list[Message] = []
        self.authorizations: list[str | bytes | None] = []
        self.named_tasks: list[str | bytes | None] = []  # by metadata
        self.status: Any = None
        self.num_failures: int | None = None  # then calls succeed
        self.fail_stream_after: int | None = None
        self.is_endless = False
        self.is_old = False  # tells no limits
        self.has_versions = False  # of whatever is registered
        self.stream_finish_reason = generation_pb2.FINISH_REASON_LENGTH
        self.delay_s = 0.0
        self.echoes = False  # answers are prompts, and tell how many calls run
        self.num_running = 0
        self.most_running = 0
        self._counting = threading.Lock()
        self.stream_began = threading.Event()
        self.stream_ended = threading.Event()
        self.uploaded: dict[str, bytearray] = {}
        self.largest_chunk = 0
        self.adapters = [make_adapter("sql", 1), make_adapter("sql", 2), make_adapter("tldr", 1)]
        self.health = health.HealthServicer()

    @property
    def last_request(self) -> Any:
        return self.requests[-1]

    def set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self.health.set("", status.SERVING if is_serving else status.NOT_SERVING)

    def see(self, request: Message, context: grpc.ServicerContext) -> None:
        """Records the request, and fails it where the test says so."""
        self.requests.append(request)
        time.sleep(self.delay_s)
        is_well = self.num_failures is not None and len(self.requests) > self.num_failures
        if self.status is not None and self.fail_stream_after is None and not is_well:
            self.fail(context)

    @contextmanager
    def running(self) -> Iterator[int]:
        """Counts a call; gives how many there are."""
        with self._counting:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
            num_running = self.num_running
        try:
            yield num_running
        finally:
            with self._counting:
                self.num_running -= 1

    def fail(self, context: grpc.ServicerContext) -> None:
        if not self.status.details:
            context.abort(
                next(code for code in grpc.StatusCode if code.value[0] == self.status.code),
                self.status.message,
            )
        status = rpc_status.to_status(self.status)
        context.set_trailing_metadata((*status.trailing_metadata, *self.pushback()))
        context.abort(status.code, status.details)

    def pushback(self) -> tuple[tuple[str, str], ...]:
        """Of what waiting does not help, or beside ``RetryInfo``, as the server has it."""
        retry = error_details_pb2.RetryInfo()
        found = [detail for detail in self.status.details if detail.Unpack(retry)]
        return (("grpc-retry-pushback-ms", str(retry.retry_delay.ToMilliseconds()) if found else "-1"),)


def _ref(task_id: str) -> adapter_pb2.AdapterRef | None:
    """The adapter that answers; None is the base model."""
    return adapter_pb2.AdapterRef(task_id=task_id, version=2, digest="sha256:ab") if task_id else None


def _token(index: int, with_logprobs: bool) -> generation_pb2.TokenInfo:
    token = generation_pb2.TokenInfo(id=10 + index, text=PIECES[index % len(PIECES)])
    if with_logprobs:
        token.logprob = -0.5 * (index + 1)
        token.rank = index + 1
        token.top.add(id=99, text="best", logprob=-0.1)
    return token


def _usage(generated_tokens: int) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=7,
        cached_prompt_tokens=3,
        generated_tokens=generated_tokens,
        queue_ms=1.5,
        prefill_ms=2.5,
        decode_ms=3.5,
    )


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Generate(self, request: Any, context: Any) -> Any:
        with self._fake.running() as num_running:
            self._fake.see(request, context)
            return self._answer(request, num_running)

    def _answer(self, request: Any, num_running: int) -> Any:
        wants = request.response.logprobs
        prompt_tokens = [generation_pb2.TokenInfo(id=1, text="<s>"), _token(0, True)]
        more = [
            generation_pb2.GeneratedSequence(
                text=f"{TEXT}{index}",
                tokens=[_token(0, wants)],
                finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                usage=_usage(1),
            )
            for index in range(1, request.num_sequences)
        ]
        return generation_pb2.GenerateResponse(
            request_id=request.request_id or "made-by-server",
            text=f"{request.text} {num_running}" if self._fake.echoes else TEXT,
            tokens=[_token(i, wants) for i in range(len(PIECES))],
            prompt_tokens=prompt_tokens if request.response.prompt_logprobs else [],
            finish_reason=generation_pb2.FINISH_REASON_EOS,
            usage=_usage(len(PIECES)),
            adapter=_ref(request.task_id),
            more_sequences=more,
        )

    def GenerateStream(self, request: Any, context: Any) -> Any:
        context.add_callback(self._fake.stream_ended.set)
        self._fake.see(request, context)
        index = 0
        while self._fake.is_endless or index < len(PIECES):
            if self._fake.fail_stream_after == index:
                self._fake.fail(context)
            if self._fake.is_endless and index >= len(PIECES):
                time.sleep(0.01)
            if not context.is_active():
                return
            yield self._piece(request, index)
            for sequence_index in range(1, request.num_sequences):
                piece = self._piece(request, index)
                piece.sequence_index = sequence_index
                yield piece
            index += 1

    def _piece(self, request: Any, index: int) -> generation_pb2.GenerateStreamResponse:
        is_first, is_last = index == 0, index == len(PIECES) - 1 and not self._fake.is_endless
        piece = generation_pb2.GenerateStreamResponse(
            request_id=(request.request_id or "made-by-server") if is_first else "",
            text=PIECES[index % len(PIECES)],
            tokens=[_token(index % len(PIECES), False)],
            usage=_usage(0) if is_first else _usage(len(PIECES)) if is_last else None,
            adapter=_ref(request.task_id) if is_first else None,
        )
        if is_last:
            piece.finish_reason = self._fake.stream_finish_reason
        return piece

    def Score(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        scores = [
            generation_pb2.ScoredContinuation(logprob=-1.0 - i, num_tokens=2, tokens=[_token(0, True)])
            for i in range(len(request.continuations))
        ]
        return generation_pb2.ScoreResponse(
            scores=scores, usage=_usage(0), adapter=_ref(request.task_id), request_id="made-by-server"
        )

    def Tokenize(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        return generation_pb2.TokenizeResponse(ids=[1, 2], pieces=["a", "b"])


def _scores(*labels: str) -> list[encoding_pb2.ClassScore]:
    return [
        encoding_pb2.ClassScore(label=label, index=index, score=0.75 / 3**index, logit=1.5 - index)
        for index, label in enumerate(labels)
    ]


class _Encoding(encoding_pb2_grpc.EncodingServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Embed(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        return encoding_pb2.EmbedResponse(
            request_id=request.request_id or "made-by-server",
            embeddings=[
                encoding_pb2.Embedding(values=[index, 0.5], num_tokens=3)
                for index in range(len(request.inputs))
            ],
            usage=_usage(0),
            adapter=_ref(request.task_id),
            base_digest="sha256:ba5e",
        )

    def Classify(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        results = [
            encoding_pb2.Classification(
                classes=_scores("good", "bad")[: request.top_k or None], num_tokens=3, adapter=_ref(task)
            )
            for _ in request.inputs
            for task in request.task_ids
        ]
        return encoding_pb2.ClassifyResponse(request_id="made-by-server", results=results, usage=_usage(0))

    def ClassifyTokens(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        results = []
        for each in request.inputs:
            tagged = encoding_pb2.TaggedText(num_tokens=3)
            if request.aggregation:
                tagged.entities.add(label="PER", start=0, end=4, text=each.text[:4], score=0.75)
            else:
                classes = _scores("B-PER", "O")
                tagged.tokens.add(token_index=1, start=0, end=4, classes=classes)
            results.append(tagged)
        return encoding_pb2.ClassifyTokensResponse(
            request_id="made-by-server", results=results, usage=_usage(0), adapter=_ref(request.task_id)
        )

    def Rerank(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        order = list(range(len(request.texts)))[::-1][: request.top_n or None]
        results = [
            encoding_pb2.RankedText(
                index=index, score=0.25 * index, text=request.texts[index] if request.return_texts else ""
            )
            for index in order
        ]
        return encoding_pb2.RerankResponse(
            request_id="made-by-server", results=results, usage=_usage(0), adapter=_ref(request.task_id)
        )


class _Adapters(adapter_pb2_grpc.AdapterServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def RegisterAdapter(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        return adapter_pb2.RegisterAdapterResponse(
            adapter=make_adapter(request.task_id, 3), created=not self._fake.has_versions
        )

    def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:
        context.add_callback(self._fake.stream_ended.set)
        header = next(request_iterator).header
        self._fake.stream_began.set()
        self._fake.see(header, context)
        context.send_initial_metadata((("manyhats-upload", "accepted"),))
        files = {file.name: bytearray(file.size_bytes) for file in header.files}
        names = list(files)
        for request in request_iterator:
            chunk = request.chunk
            end = chunk.offset + len(chunk.data)
            files[names[chunk.file_index]][chunk.offset : end] = chunk.data
            self._fake.largest_chunk = max(self._fake.largest_chunk, len(chunk.data))
        if self._fake.is_endless:
            while context.is_active():
                time.sleep(0.01)
        for file in header.files:
            if hashlib.sha256(files[file.name]).hexdigest() != file.sha256:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{file.name}: not the bytes announced")
        self._fake.uploaded = files
        return adapter_pb2.UploadAdapterResponse(adapter=make_adapter(header.task_id, 3), created=True)

    def ActivateAdapter(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        task_id, _, version = request.task_id.partition("@")
        return adapter_pb2.ActivateAdapterResponse(adapter=make_adapter(task_id, int(version)))

    def PinAdapter(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        adapter = make_adapter(request.task_id.partition("@")[0], 2)
        adapter.pinned = True
        return adapter_pb2.PinAdapterResponse(adapter=adapter)

    def UnpinAdapter(self, request: Any, context: Any) -> Any:
        """The task "sql" stays pinned by its name."""
        self._fake.see(request, context)
        task_id, _, version = request.task_id.partition("@")
        adapter = make_adapter(task_id, 2)
        adapter.pinned = bool(version)
        return adapter_pb2.UnpinAdapterResponse(adapter=adapter)

    def GetAdapter(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        return adapter_pb2.GetAdapterResponse(adapter=make_adapter(request.task_id.partition("@")[0], 2))

    def ListAdapters(self, request: Any, context: Any) -> Any:
        recorded = adapter_pb2.ListAdaptersRequest()
        recorded.CopyFrom(request)
        self._fake.see(recorded, context)
        found = [a for a in self._fake.adapters if request.task_id in ("", a.task_id)]
        begin = int(request.page_token or 0)
        end = begin + (request.page_size or 2)
        return adapter_pb2.ListAdaptersResponse(
            adapters=found[begin:end], next_page_token=str(end) if end < len(found) else ""
        )

    def DeleteAdapter(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        return adapter_pb2.DeleteAdapterResponse(adapters=[make_adapter("sql", 1), make_adapter("sql", 2)])


LIMITS = server_pb2.ServerLimits(
    max_request_bytes=8_000_000,
    max_sequences=32,
    max_waiting=256,
    max_adapters=8,
    max_continuations=1024,
    max_artifact_bytes=2_000_000_000,
    max_adapter_rank=64,
    max_virtual_tokens=512,
    max_parts=16,
    max_transfers=4,
    max_tasks=7,
    max_bytes_per_task=9_000_000,
)


class _Server(server_pb2_grpc.ServerServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self._fake.see(request, context)
        return server_pb2.GetServerInfoResponse(
            version="0.1.0",
            base_model="tiny-base",
            base_digest="sha256:ba5e",
            quantization="nf4",
            dtype="bfloat16",
            device="cpu",
            max_context_length=8192,
            vocab_size=49152,
            limits=None if self._fake.is_old else LIMITS,
            attention="" if self._fake.is_old else "causal",
            embedding_size=0 if self._fake.is_old else 576,
            default_pooling=adapter_pb2.POOLING_UNSPECIFIED
            if self._fake.is_old
            else adapter_pb2.POOLING_LAST,
            services=[] if self._fake.is_old else ["manyhats.v1.EncodingService"],
        )


class _SeesMetadata(grpc.ServerInterceptor):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        metadata = dict(handler_call_details.invocation_metadata)
        self._fake.authorizations.append(metadata.get("authorization"))
        self._fake.named_tasks.append(metadata.get("x-manyhats-task"))
        return continuation(handler_call_details)


@contextmanager
def running_server(credentials: grpc.ServerCredentials | None = None, port: int = 0) -> Iterator[FakeServer]:
    """Serves a ``FakeServer`` on a port of this machine, by default a free one, in the clear or by TLS."""
    fake = FakeServer()
    with ThreadPoolExecutor(max_workers=8) as pool:
        server = grpc.server(pool, interceptors=[_SeesMetadata(fake)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(fake), server)
        encoding_pb2_grpc.add_EncodingServiceServicer_to_server(_Encoding(fake), server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(_Adapters(fake), server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(_Server(fake), server)
        health_pb2_grpc.add_HealthServicer_to_server(fake.health, server)
        fake.set_serving(True)
        if credentials is None:
            port = server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
        fake.target = f"127.0.0.1:{port}"
        server.start()
        try:
            yield fake
        finally:
            server.stop(grace=None).wait()


if __name__ == "__main__":  # a process of its own, to be killed; it listens on the port given, and echoes
    with running_server(port=int(sys.argv[1])) as alone:
        alone.echoes = True
        threading.Event().wait()
