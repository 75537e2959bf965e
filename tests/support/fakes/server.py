"""A backend without a model (echoing engine, byte tokenizer, store in memory), and a server on it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from google.rpc import status_pb2  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo  # type: ignore[import-untyped]
from grpc_status import rpc_status

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.errors import (
    AdapterInUseError,
    ArgumentInvalidError,
    NoActiveVersionError,
    TaskNotFoundError,
)
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Parts, Registered, Registration
from manyhats.adapters.store.catalogue.pages import decode_page_token, encode_page_token
from manyhats.adapters.taskid import parse_name
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.output import (
    EncodeOutput,
    EngineStats,
    FinishReason,
    ScoredContinuation,
    ScoreOutput,
    StepOutput,
    TokenOutput,
    TopToken,
    Usage,
)
from manyhats.engine.request import EncodeRequest, Request, ScoreRequest
from manyhats.engine.residency.residency import ResidencyStats
from manyhats.engine.residency.tiers import DeviceBytes, Tier
from manyhats.engine.text.chat_template import Rendering
from manyhats.engine.text.prompt_text import Continuation
from manyhats.engine.text.tokenizer import ChatMessage, ReadText, TokenSpan
from manyhats.server.access.tls import ServerTls
from manyhats.server.access.tokens import TokenFile
from manyhats.server.grpc.port import GrpcLimits, GrpcPort
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.http.connection import ConnectionLimits
from manyhats.server.http.port import HttpPort
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.wiring import limits
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.backend import Backend, ModelInfo
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from manyhats.v1.encoding_pb2_grpc import EncodingServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from manyhats.v1.server_pb2_grpc import ServerServiceStub

if TYPE_CHECKING:
    from manyhats.server.observability.tracing import Tracing
    from manyhats.v1.adapter_pb2_grpc import AdapterServiceAsyncStub
    from manyhats.v1.encoding_pb2_grpc import EncodingServiceAsyncStub
    from manyhats.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from manyhats.v1.server_pb2_grpc import ServerServiceAsyncStub

BOS = 1
VOCAB_SIZE = 300
# A channel's options; otherwise gRPC takes megabytes for a client that reads nothing.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))


class BytePrompt:
    """Token id = byte + 2; 1 begins a sequence."""

    length_again = 0

    def __init__(self, text: str, *, begins: bool, max_tokens: int | None) -> None:
        self.token_ids = ((BOS,) if begins else ()) + byte_ids(text)
        if max_tokens is not None and len(self.token_ids) > max_tokens:
            raise PromptTooLongError("text", len(self.token_ids), max_tokens)

    def followed_by(self, text: str) -> Continuation:
        return Continuation(len(self.token_ids), byte_ids(text))


def byte_ids(text: str) -> tuple[int, ...]:
    return tuple(byte + 2 for byte in text.encode())


class ByteTokenizer:
    """Of such prompts."""

    vocab_size = VOCAB_SIZE
    special_tokens: Mapping[str, str] = {"bos_token": "", "eos_token": "\x00"}
    chat_template = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"

    def prompt(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> BytePrompt:
        return BytePrompt(text, begins=add_special_tokens, max_tokens=max_tokens)

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        template: str | None = None,
        *,
        rendering: Rendering,
        max_tokens: int | None = None,
    ) -> BytePrompt:
        if any(message.role == "refused" for message in messages):
            raise FieldInvalidError("chat", "the chat template refused the messages")
        return self.prompt(
            "".join(f"{each.role}:{each.content};" for each in messages), max_tokens=max_tokens
        )

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
    ) -> list[int]:
        return list(self.read(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens).token_ids)

    def read(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        first: str | None = None,
        truncates: bool = False,
    ) -> ReadText:
        whole = text if first is None else f"{first}\t{text}"
        limit = None if truncates else max_tokens
        prompt = BytePrompt(whole, begins=add_special_tokens, max_tokens=limit)
        return ReadText(tuple(prompt.token_ids[:max_tokens]))

    def spans(self, text: str, *, add_special_tokens: bool, max_tokens: int) -> list[TokenSpan]:
        begun = [TokenSpan(0, 0, None)] if add_special_tokens else []
        spans = begun + [
            TokenSpan(index, index + 1, len(text[:index].split(" ")))
            for index, character in enumerate(text)
            for _ in character.encode()
        ]
        return spans[:max_tokens]

    def check_length(self, text: str, max_tokens: int) -> None:
        if len(text.encode()) > max_tokens:
            raise PromptTooLongError("text", len(text.encode()), max_tokens)

    def followed_by(self, text: str) -> tuple[int, ...]:
        return byte_ids(text)

    def piece(self, token_id: int) -> str:
        return chr(token_id - 2) if token_id >= 2 else ""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 2]) if token_id >= 2 else b""

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.piece(token_id) for token_id in ids)


def scored_token(token_id: int, num_top: int = 0) -> TokenOutput:
    """A token that was the most likely one, with the next ones by their ids."""
    piece = ByteTokenizer().piece
    ids = [(token_id - 2 + place) % 256 + 2 for place in range(num_top)]
    top = tuple(TopToken(each, piece(each), -0.5 - place) for place, each in enumerate(ids))
    return TokenOutput(token_id, piece(token_id), -0.5, 1, top)


@dataclass
class EchoEngine:
    """Answers with the prompt's own tokens, one a step. What tests turn is public."""

    step_s: float = 0.0
    max_context_length: int = 1024
    error: Exception | None = None
    queue_error: Exception | None = None
    error_after: int = 0
    is_alive: bool = True
    heartbeat_s: float | None = None
    silent_s: float = 0.0
    running: int = 0
    resident: dict[str, AdapterRecord] = field(default_factory=dict)
    without_slot: set[str] = field(default_factory=set)
    device: DeviceBytes | None = field(default_factory=lambda: DeviceBytes(used=70, free=30, copied=200))
    used: set[str] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)
    pin_error: Exception | None = None
    asked_to_pin: list[str] = field(default_factory=list)
    warm_error: Exception | None = None
    warm_s: float = 0.0
    warmed: list[AdapterRecord] = field(default_factory=list)
    effect: float = 0.25
    probed: list[LoweredAdapter] = field(default_factory=list)
    waiting_adapters: tuple[str, ...] = ()
    requests: list[Request] = field(default_factory=list)
    score_requests: list[ScoreRequest] = field(default_factory=list)
    encode_requests: list[EncodeRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    stopped: bool = False
    model_bytes: Mapping[str, int] = field(default_factory=lambda: {"base": 1000, "kv": 500})

    @property
    def stats(self) -> EngineStats:
        heartbeat_s = time.time() if self.heartbeat_s is None else self.heartbeat_s
        return EngineStats(
            self.running,
            2,
            3,
            4,
            10,
            heartbeat_s,
            kv_block_size=16,
            waiting_adapters=self.waiting_adapters,
        )

    def call_when_silent(self, limit_s: float, on_hang: Callable[[float], None]) -> None:
        self.hang_limit_s = limit_s

    async def start(self) -> None:
        self.is_alive = True

    async def stop(self, drain_s: float, step_limit_s: float | None = None) -> None:
        self.stopped = True

    def check_queue(
        self, adapter: AdapterRecord | None = None, num_tokens: int = 0, deadline_s: float | None = None
    ) -> None:
        if self.queue_error is not None:
            raise self.queue_error

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        self.running += 1
        try:
            ids = request.prompt_token_ids[: request.stopping.max_new_tokens]
            for index, token_id in enumerate(ids):
                if self.error is not None and index == self.error_after:
                    raise self.error
                await asyncio.sleep(self.step_s)
                yield self._output(request, index, token_id, is_last=index == len(ids) - 1)
        finally:
            self.running -= 1
            self.closed.append(request.id)

    def _output(self, request: Request, index: int, token_id: int, *, is_last: bool) -> StepOutput:
        piece = ByteTokenizer().piece(token_id)
        wants_prompt = request.response.prompt_logprobs and index == 0
        prompt = request.prompt_token_ids if wants_prompt else ()
        num_top = request.response.top_logprobs
        is_scored = request.response.logprobs
        return StepOutput(
            text=piece,
            tokens=(scored_token(token_id, num_top) if is_scored else TokenOutput(token_id, piece),),
            prompt_tokens=tuple(
                scored_token(each, num_top) if place else TokenOutput(each, ByteTokenizer().piece(each))
                for place, each in enumerate(prompt)
            ),
            finish_reason=FinishReason.LENGTH if is_last else None,
            usage=Usage(len(request.prompt_token_ids), 1, index + 1, 0.001, 0.002, 0.003 * index, 0.0005),
            time_s=time.monotonic(),
        )

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        self.score_requests.append(request)
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.step_s)
        scores = [
            ScoredContinuation(-float(len(ids)), tuple(TokenOutput(each, "t", -1.0, 1) for each in ids))
            for ids in request.continuations
        ]
        return ScoreOutput(scores, Usage(prompt_tokens=len(request.prompt_token_ids)))

    async def encode(self, request: EncodeRequest) -> EncodeOutput:
        """Of each text what ``_encoded`` says, which stands for hidden values and heads."""
        self.encode_requests.append(request)
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.step_s)
        usage = Usage(prompt_tokens=request.num_tokens, queue_s=0.001, prefill_s=0.002)
        return EncodeOutput([_encoded(request, ids) for ids in request.inputs], usage)

    async def warm_adapter(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        self.warmed.append(record)
        await asyncio.sleep(self.warm_s)
        if self.warm_error is not None:
            raise self.warm_error
        self.resident[record.digest] = record

    def probe(self, adapter: LoweredAdapter) -> float:
        self.probed.append(adapter)
        return self.effect

    def forget_adapter(self, digest: str) -> None:
        self.resident.pop(digest, None)
        self.pinned.discard(digest)

    @property
    def residency_stats(self) -> ResidencyStats:
        return ResidencyStats(
            num_loads=8,
            num_evictions=5,
            num_slot_evictions=7,
            load_seconds=1.0,
            resident_bytes=10,
            pinned_bytes=len(self.pinned),
            device=self.device,
        )

    def adapter_tiers(self) -> dict[str, Tier]:
        return {each: Tier.HOST if each in self.without_slot else Tier.DEVICE for each in self.resident}

    def resident_digests(self) -> frozenset[str]:
        return frozenset(self.resident)

    def in_use(self, record: AdapterRecord) -> bool:
        return record.name in self.used

    async def pin_adapter(self, record: AdapterRecord) -> None:
        self.asked_to_pin.append(record.name)
        if self.pin_error is not None:
            raise self.pin_error
        self.resident[record.digest] = record
        self.pinned.add(record.digest)

    def unpin_adapter(self, digest: str) -> None:
        self.pinned.discard(digest)

    def pinned_digests(self) -> frozenset[str]:
        return frozenset(self.pinned)


def _encoded(request: EncodeRequest, ids: Sequence[int]) -> Any:
    """For a head of so many classes, 1, 2, … times a hundredth of the last token's id, or of each token's.

    Otherwise the shares of the tokens by their ids modulo the number of the labels, or of 8.
    """
    adapter = request.adapter
    if request.applies_head and adapter is not None and adapter.num_classes:
        is_of_tokens = adapter.kind is TaskKind.CLASSIFY_TOKENS
        read = np.array([[each] for each in (ids if is_of_tokens else ids[-1:])], dtype=np.float32)
        return read / 100 * np.arange(1, adapter.num_classes + 1, dtype=np.float32)
    labels = {} if adapter is None else adapter.labels
    size = (
        (sum(label.startswith("class.") for label in labels) or 1)
        if request.applies_head
        else INFO.embedding_size
    )
    return np.bincount(np.array(ids) % size, minlength=size).astype(np.float32)[None] / len(ids)


@dataclass(frozen=True)
class FakePage:
    records: tuple[AdapterRecord, ...]
    next_page_token: str


@dataclass
class FakeUpload:
    """An upload of ``MemoryStore``; ``write`` waits while ``may_write`` is not set."""

    publish: Callable[..., Registered]
    may_write: threading.Event
    pieces: list[tuple[int, int, bytes]] = field(default_factory=list)
    is_aborted: bool = False
    names: list[str] = field(default_factory=list)

    def open_file(self, name: str) -> None:
        self.names.append(name)

    def write(self, file_index: int, offset: int, data: bytes) -> None:
        assert self.may_write.wait(5)
        self.pieces.append((file_index, offset, data))

    def finish(self, *, probe: Probe | None = None, prepare: Prepare | None = None) -> Registered:
        return self.publish(probe=probe, prepare=prepare)

    def abort(self) -> None:
        self.is_aborted = True


@dataclass
class MemoryStore:
    """Every uri is an adapter whose digest is its name. Errors for chosen uris are in ``errors``.

    ``facts`` are other fields of records by uri. ``others_changed`` are the tasks that the next ``refresh`` tells of,
    ``refresh_error`` makes it fail.
    """

    tasks: dict[str, list[AdapterRecord]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    uploads: list[FakeUpload] = field(default_factory=list)
    may_open: threading.Event = field(default_factory=threading.Event)
    may_write: threading.Event = field(default_factory=threading.Event)
    others_changed: set[str] = field(default_factory=set)
    refresh_error: Exception | None = None
    read_error: Exception | None = None
    write_error: Exception | None = None
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.may_open.set()
        self.may_write.set()

    def check_reads(self) -> None:
        if self.read_error is not None:
            raise self.read_error

    def check_writes(self) -> None:
        if self.write_error is not None:
            raise self.write_error

    def register(
        self, registration: Registration, *, probe: Probe | None = None, prepare: Prepare | None = None
    ) -> Registered:
        task_id, source, activate = registration.task_id, registration.source, registration.activate
        parts = source.parts if isinstance(source, Parts) else ()
        uri = "+".join(f"{part.weight:g}*{part.uri}" for part in parts) or registration.source_name
        if uri in self.errors:
            raise self.errors[uri]
        versions = self.tasks.get(task_id, [])
        state = AdapterState.ACTIVE if activate else AdapterState.INACTIVE
        record = make_record(
            task_id, 0 if registration.validate_only else len(versions) + 1, uri, state, registration.labels
        )
        record = replace(record, **self.facts.get(uri, {}))
        if probe is not None:
            record = replace(record, effect=probe(LoweredAdapter(record.digest, ())))
        if parts:
            record = replace(
                record,
                method=AdapterMethod.COMPOSED,
                parts=tuple(ArtifactPart(f"sha256:{part.uri}", part.weight, part.uri) for part in parts),
            )
        if prepare is not None and activate and not registration.validate_only:
            prepare(
                replace(record, version=0, state=AdapterState.CREATING), LoweredAdapter(record.digest, ())
            )
        for existing in versions:
            if existing.digest == record.digest:
                return Registered(existing, created=False)
        if not registration.validate_only:
            if activate:
                versions = [replace(each, state=AdapterState.INACTIVE) for each in versions]
            self.tasks[task_id] = [*versions, record]
        return Registered(record, created=not registration.validate_only)

    def open_upload(self, registration: Registration) -> FakeUpload:
        assert self.may_open.wait(5)
        upload = FakeUpload(partial(self.register, registration), self.may_write)
        self.uploads.append(upload)
        return upload

    def get(self, name: str) -> AdapterRecord:
        return self.resolve(name)

    def resolve(self, name: str) -> AdapterRecord:
        parsed = parse_name(name)
        for record in self.versions(parsed.task_id):
            if parsed.version == record.version:
                return record
            if parsed.version is None and record.state is AdapterState.ACTIVE:
                return record
        if parsed.version is None:
            raise NoActiveVersionError(name, "has no active version")
        raise TaskNotFoundError(name, "does not exist")

    def versions(self, task_id: str) -> Sequence[AdapterRecord]:
        if task_id not in self.tasks:
            raise TaskNotFoundError(task_id, "does not exist")
        return self.tasks[task_id]

    def has_digest(self, digest: str) -> bool:
        return any(record.digest == digest for records in self.tasks.values() for record in records)

    def activate(self, name: str) -> AdapterRecord:
        parsed = parse_name(name)
        if parsed.version is None:
            raise ArgumentInvalidError("task_id", "must name a version")
        active = self.resolve(name)
        self.tasks[parsed.task_id] = [
            replace(
                each, state=AdapterState.ACTIVE if each.version == active.version else AdapterState.INACTIVE
            )
            for each in self.tasks[parsed.task_id]
        ]
        return self.resolve(name)

    def set_pin(self, name: str, *, is_pinned: bool) -> AdapterRecord:
        record = replace(self.resolve(name), is_pinned=is_pinned)
        versions = self.tasks[record.task_id]
        self.tasks[record.task_id] = [record if each.version == record.version else each for each in versions]
        return record

    def pinned(self) -> Sequence[AdapterRecord]:
        return [record for records in self.tasks.values() for record in records if record.is_pinned]

    def refresh(self) -> set[str]:
        if self.refresh_error is not None:
            raise self.refresh_error
        changed, self.others_changed = self.others_changed, set()
        return changed

    def close(self) -> None:
        self.is_closed = True

    def list(self, *, task_id: str = "", page_size: int = 0, page_token: str = "") -> FakePage:
        records = [
            record for task in sorted(self.tasks) if task_id in ("", task) for record in self.tasks[task]
        ]
        after = decode_page_token(page_token, task_id)
        behind = [record for record in records if (record.task_id, record.version) > after]
        page, more = behind[: page_size or 100], len(behind) > (page_size or 100)
        token = encode_page_token(task_id, page[-1].task_id, page[-1].version) if more else ""
        return FakePage(tuple(page), token)

    def delete(
        self, name: str, *, in_use: Callable[[AdapterRecord], bool], force: bool = False
    ) -> tuple[AdapterRecord, ...]:
        parsed = parse_name(name)
        gone = tuple(self.versions(name)) if parsed.version is None else (self.resolve(name),)
        for record in gone:
            if in_use(record) and not force:
                raise AdapterInUseError(record.name, "is in use")
        kept = [record for record in self.tasks[parsed.task_id] if record not in gone]
        self.tasks[parsed.task_id] = kept
        if not kept:
            del self.tasks[parsed.task_id]
        return gone


def make_record(
    task_id: str,
    version: int = 1,
    uri: str = "a",
    state: AdapterState = AdapterState.ACTIVE,
    labels: Mapping[str, str] | None = None,
    kind: TaskKind = TaskKind.GENERATE,
) -> AdapterRecord:
    """A version of a task."""
    return AdapterRecord(
        task_id=task_id,
        version=version,
        digest=f"sha256:{uri}",
        method=AdapterMethod.LORA,
        state=state,
        parts=(ArtifactPart(f"sha256:{uri}", source=uri),),
        size_bytes=100,
        num_parameters=50,
        source=uri,
        create_time=datetime(2026, 1, 2, tzinfo=UTC),
        labels=labels or {},
        notes=("a note",),
        kind=kind,
    )


INFO = ModelInfo(
    name="echo",
    digest="sha256:base",
    quantization="nf4",
    dtype="bfloat16",
    device="cpu",
    vocab_size=VOCAB_SIZE,
    embedding_size=8,
)


LIMITS = replace(limits(ServeConfig()), max_adapters=4, max_tasks=10**12, max_bytes=10**30)


def make_backend(engine: EchoEngine, store: Any, tokenizer: Any = None, base: str = "echo") -> Backend:
    """The fakes as what answers requests."""
    return Backend(
        engine=engine,
        store=store,
        tokenizer=tokenizer or ByteTokenizer(),
        info=replace(INFO, name=base),
        limits=LIMITS,
    )


@dataclass
class Running:
    """A server on real ports, its fakes, and a client's channel."""

    engine: EchoEngine
    store: Any
    gate: Gate
    metrics: Metrics
    port: GrpcPort
    http: str
    channel: grpc.aio.Channel
    calls: Calls
    stop_http: Callable[[], Awaitable[None]]

    @property
    def generation(self) -> GenerationServiceAsyncStub:
        return GenerationServiceStub(self.channel)

    @property
    def encoding(self) -> EncodingServiceAsyncStub:
        return EncodingServiceStub(self.channel)

    @property
    def adapters(self) -> AdapterServiceAsyncStub:
        return AdapterServiceStub(self.channel)

    @property
    def server(self) -> ServerServiceAsyncStub:
        return ServerServiceStub(self.channel)


@asynccontextmanager
async def running_server(
    *,
    is_open: bool = True,
    max_task_labels: int = 10,
    engine: EchoEngine | None = None,
    store: Any = None,
    tokenizer: Any = None,
    base: str = "echo",
    max_calls: int = 1000,
    tls: ServerTls | None = None,
    tokens: TokenFile | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    needs_certificate: bool = False,
    body_limit_s: float = 30.0,
    head_limit_s: float = 10.0,
    tracing: Tracing | None = None,
    **limits: Any,
) -> AsyncIterator[Running]:
    """A server on fakes and free ports; with ``is_open`` false it is still loading. ``limits`` are the gRPC port's."""
    engine, store = engine or EchoEngine(), store or MemoryStore()
    metrics, gate = Metrics(max_task_labels=max_task_labels), Gate(heartbeat_limit_s=5.0, max_calls=max_calls)
    backend = make_backend(engine, store, tokenizer, base)
    if is_open:
        metrics.attach(backend)
        gate.open(backend)
    calls = Calls(gate, metrics, tracing)
    around = Surroundings(
        calls=calls,
        answers=Answers(unread_limit_s=limits.get("unread_limit_s", 60.0)),
        tokens=tokens,
        needs_certificate=needs_certificate,
        body_limit_s=body_limit_s,
    )
    app = make_app(around, is_local=tokens is None and tls is None, has_page=True)
    metrics.attach_files(tls, tokens)
    connections = ConnectionLimits(
        head_limit_s=head_limit_s, unread_limit_s=limits.get("unread_limit_s", 60.0)
    )
    http = HttpPort(app, host="127.0.0.1", port=0, tls=tls, limits=connections)
    metrics.attach_http(http)
    await http.start()
    port = GrpcPort(calls, host="127.0.0.1", port=0, tls=tls, tokens=tokens, limits=GrpcLimits(**limits))
    await port.start()
    try:
        async with open_channel(port.address, credentials) as channel:
            stop_http = partial(http.stop, 0.0)
            yield Running(engine, store, gate, metrics, port, http.address, channel, calls, stop_http)
    finally:
        await port.stop(0.0)
        await http.stop(0.0)


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel with a connection of its own: a new handshake."""
    own = (("grpc.use_local_subchannel_pool", 1),)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=own)
    return grpc.aio.secure_channel(address, credentials, options=own)


@dataclass(frozen=True)
class Refusal:
    """A failed call as its caller sees it."""

    code: grpc.StatusCode
    message: str
    info: ErrorInfo
    fields: tuple[str, ...]
    retry_s: float | None
    pushback_ms: int | None  # what gRPC's clients wait for

    @property
    def reason(self) -> str:
        return str(self.info.reason)


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """Unpacks the rich status of a failed call."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"no rich status: {error.code()} {error.details()}"
    info, fields, retry_s = _unpacked(status)
    pushback = [int(value) for key, value in error.trailing_metadata() if key == "grpc-retry-pushback-ms"]
    return Refusal(error.code(), status.message, info, fields, retry_s, next(iter(pushback), None))


def _unpacked(status: status_pb2.Status) -> tuple[ErrorInfo, tuple[str, ...], float | None]:
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    retry_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    return info, tuple(violation.field for violation in bad.field_violations), retry_s


async def refused(call: Awaitable[Any]) -> Refusal:
    """Awaits a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError("the call was answered")


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Waits until a condition holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        await asyncio.sleep(0.005)
