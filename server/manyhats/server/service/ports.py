"""What the server needs of engine, store and tokenizer, as protocols; tests put fakes in their place."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Registered, Registration
from manyhats.engine.output import EngineStats, ScoreOutput, StepOutput
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency.residency import ResidencyStats
from manyhats.engine.text.prompt_text import Continuation
from manyhats.engine.text.tokenizer import ChatMessage
from manyhats.server.service.task_tokenizers import TaskTokenizers
from manyhats.server.service.text_threads import TextThreads


class PromptText(Protocol):
    """A text that is to be continued, and its tokens."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens."""

    @property
    def length_again(self) -> int:
        """Characters of it that are tokenized with each text behind it, as a rule."""

    def followed_by(self, text: str) -> Continuation:
        """What a text becomes behind it."""


class Tokenizer(Protocol):
    """Text to token ids and back. Safe to call from any thread."""

    def prompt(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> PromptText:
        """A text that is to be continued; ``PromptTooLongError`` where it has more than ``max_tokens``."""

    def chat_prompt(
        self, messages: Sequence[ChatMessage], template: str | None = None, *, max_tokens: int | None = None
    ) -> PromptText:
        """A conversation, ready for the model's turn; limited as ``prompt`` is."""

    def check_length(self, text: str, max_tokens: int) -> None:
        """``PromptTooLongError`` where the length of a text already tells that it has more than ``max_tokens``."""

    def followed_by(self, text: str) -> tuple[int, ...]:
        """What a text becomes behind tokens whose text is not known."""

    def piece(self, token_id: int) -> str:
        """Text of one token by itself."""


class Engine(Protocol):
    """The running model. Requests are checked again there; errors are ``EngineError`` or ``AdapterError``."""

    @property
    def stats(self) -> EngineStats:
        """A snapshot that never waits for a step."""

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""

    @property
    def max_context_length(self) -> int:
        """Prompt and output together, in tokens."""

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """Part of the model → its bytes in memory."""

    async def start(self) -> None:
        """Start the engine thread."""

    async def stop(self, drain_s: float) -> None:
        """Take no new requests, give the running ones ``drain_s`` seconds, and end the thread."""

    def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Run one request; closing the generator ends it within one step."""

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        """Score continuations; cancelling ends it within one step."""

    async def warm_adapter(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        """Load an adapter now, so that its first request finds it loaded; ``lowered`` saves reading it."""

    def forget_adapter(self, digest: str) -> None:
        """Free an adapter's memory once no request uses it."""

    def probe(self, adapter: LoweredAdapter) -> float:
        """How far an adapter moves the base's answers, in nats; blocks, so never on the event loop."""

    @property
    def residency_stats(self) -> ResidencyStats:
        """Loads and evictions since the start."""

    def resident_digests(self) -> frozenset[str]:
        """Adapters that are loaded; a snapshot that never waits for a step."""

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request that is not finished is for this version."""


class Page(Protocol):
    """Some of the versions, in order."""

    @property
    def records(self) -> Sequence[AdapterRecord]:
        """The versions of this page."""

    @property
    def next_page_token(self) -> str:
        """Empty on the last page."""


class UploadSession(Protocol):
    """Files on their way into the store. Methods block on the disk; errors are ``AdapterError``."""

    def write(self, file_index: int, offset: int, data: bytes) -> None:
        """Take a piece of a file."""

    def finish(self, *, probe: Probe | None = None, prepare: Prepare | None = None) -> Registered:
        """Verify every byte, then do as ``Store.register``."""

    def abort(self) -> None:
        """Remove what has arrived; after the end it does nothing."""


class Store(Protocol):
    """The durable catalogue of adapters, which other servers may share.

    ``get``, ``resolve``, ``versions``, ``has_digest`` and ``list`` look things up in memory; the other methods
    block. Errors are ``AdapterError``.
    """

    def register(
        self, registration: Registration, *, probe: Probe | None = None, prepare: Prepare | None = None
    ) -> Registered:
        """Check an adapter, or several that act together, and make it a version of a task."""

    def open_upload(self, registration: Registration) -> UploadSession:
        """Check what a caller is about to send, and get ready for it."""

    def get(self, name: str) -> AdapterRecord:
        """The version that ``task`` or ``task@3`` means."""

    def resolve(self, name: str) -> AdapterRecord:
        """The version that a request for ``task`` or ``task@3`` runs on."""

    def versions(self, task_id: str) -> Sequence[AdapterRecord]:
        """All versions of a task; ``TaskNotFoundError`` where there are none."""

    def has_digest(self, digest: str) -> bool:
        """Whether any version of any task has this digest."""

    def list(self, *, task_id: str = "", page_size: int = 0, page_token: str = "") -> Page:
        """Versions by task id and version, of one task or all."""

    def activate(self, name: str) -> AdapterRecord:
        """Make ``task@3`` the version that ``task`` means."""

    def delete(
        self, name: str, *, in_use: Callable[[AdapterRecord], bool], force: bool = False
    ) -> tuple[AdapterRecord, ...]:
        """Delete one version or a whole task, and say which versions went."""

    def refresh(self) -> Collection[str]:
        """Learn what other servers changed; the tasks that changed since the last call."""

    def close(self) -> None:
        """Give back connections and files; look-ups go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The resident base model, as callers see it."""

    name: str
    digest: str
    quantization: str
    dtype: str
    device: str
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a caller may ask for at most; see ``ServeConfig``. None is no bound."""

    max_sequences: int
    max_waiting: int
    max_adapters: int
    max_artifact_bytes: int
    max_adapter_rank: int
    max_virtual_tokens: int
    max_parts: int
    max_transfers: int
    max_tasks: int | None
    max_versions_per_task: int | None
    max_bytes_per_task: int | None
    max_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """All that answers requests once the model is loaded.

    Attributes:
        store_threads: for what blocks on the store; None are the event loop's own.
        text_threads: for what takes time in proportion to a text.
        task_tokenizers: of tasks that read and write text otherwise; None where no task does.
    """

    engine: Engine
    store: Store
    tokenizer: Tokenizer
    info: ModelInfo
    limits: ServerLimits
    store_threads: Executor | None = None
    text_threads: TextThreads = field(default_factory=TextThreads)
    task_tokenizers: TaskTokenizers | None = None
