"""What the server needs of engine, store and tokenizer, as protocols; tests put fakes in their place."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.output import EngineStats, ScoreOutput, StepOutput
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency import ResidencyStats
from manyhats.engine.tokenizer import ChatMessage


class Tokenizer(Protocol):
    """Text to token ids and back. Safe to call from any thread."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``."""

    def encode_chat(self, messages: Sequence[ChatMessage], template: str | None = None) -> list[int]:
        """Token ids of a conversation, ready for the model's turn."""

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

    async def warm_adapter(self, record: AdapterRecord) -> None:
        """Load an adapter now, so that its first request finds it loaded."""

    def forget_adapter(self, digest: str) -> None:
        """Free an adapter's memory once no request uses it."""

    @property
    def residency_stats(self) -> ResidencyStats:
        """Loads and evictions since the start."""

    def resident_digests(self) -> frozenset[str]:
        """Adapters that are loaded; a snapshot that never waits for a step."""

    def in_use(self, digest: str) -> bool:
        """Whether a request that is not finished runs on this adapter."""


class Registration(Protocol):
    """What a registration came to."""

    @property
    def record(self) -> AdapterRecord:
        """The version, new or existing."""

    @property
    def created(self) -> bool:
        """Whether this registration made it."""


class Page(Protocol):
    """Some of the versions, in order."""

    @property
    def records(self) -> Sequence[AdapterRecord]:
        """The versions of this page."""

    @property
    def next_page_token(self) -> str:
        """Empty on the last page."""


class Store(Protocol):
    """The durable catalogue of adapters. Methods block on the disk; errors are ``AdapterError``."""

    def register(
        self,
        task_id: str,
        uri: str,
        *,
        activate: bool = True,
        validate_only: bool = False,
        expected_digest: str = "",
        request_id: str = "",
        labels: Mapping[str, str] = ...,
    ) -> Registration:
        """Check an artifact and make it a version of a task."""

    def get(self, name: str) -> AdapterRecord:
        """The version that ``task`` or ``task@3`` means."""

    def versions(self, task_id: str) -> Sequence[AdapterRecord]:
        """All versions of a task; ``TaskNotFoundError`` where there are none."""

    def list(self, *, task_id: str = "", page_size: int = 0, page_token: str = "") -> Page:
        """Versions by task id and version, of one task or all."""

    def delete(
        self, name: str, *, in_use: Callable[[AdapterRecord], bool], force: bool = False
    ) -> tuple[AdapterRecord, ...]:
        """Delete one version or a whole task, and say which versions went."""

    def resolve(self, name: str) -> AdapterRecord:
        """The version that a request for ``task`` or ``task@3`` runs on."""


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
class Backend:
    """All that answers requests once the model is loaded.

    ``max_adapters`` is the number of adapters that can be resident at once.
    """

    engine: Engine
    store: Store
    tokenizer: Tokenizer
    info: ModelInfo
    max_adapters: int
