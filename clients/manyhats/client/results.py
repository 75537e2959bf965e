"""What the client returns: frozen dataclasses, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum


class FinishReason(Enum):
    """Why a generation ended; UNSPECIFIED stands for a reason this client does not know."""

    UNSPECIFIED = "unspecified"
    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens at a step."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token.

    Attributes:
        id: in the model's vocabulary.
        text: of this token on its own; part of a character shows as U+FFFD.
        logprob: natural log-probability from the raw logits; None unless requested.
        rank: 1 for the most likely token; None unless requested.
        top: the most likely tokens at this step, best first.
    """

    id: int
    text: str
    logprob: float | None = None
    rank: int | None = None
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request cost: tokens, and times in milliseconds; of ``draft_tokens`` guessed, those accepted came."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    adapter_load_ms: float = 0.0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Which adapter version answered."""

    task_id: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer.

    Attributes:
        text: without EOS, and without the stop sequence unless requested.
        tokens: every generated token, EOS and stop included.
        finish_reason: why it ended.
        usage: what it cost.
        adapter: which one answered; None for the base model.
        prompt_tokens: the prompt's tokens, with ``prompt_logprobs``.
        request_id: the caller's, or the one the server gave.
        more: the further answers, with ``num_sequences``. Their prompt was computed with the first one's.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    adapter: AdapterRef | None = None
    prompt_tokens: tuple[Token, ...] = ()
    request_id: str = ""
    more: tuple[Generation, ...] = ()

    @property
    def sequences(self) -> tuple[Generation, ...]:
        """All answers: this one and the further ones."""
        return (self, *self.more)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """A piece of a streamed answer: ``text`` and ``tokens`` are what is new.

    ``finish_reason`` is None until the last chunk. The first chunk carries ``adapter``, ``prompt_tokens`` and
    the prompt's part of ``usage``; the last the whole ``usage``. With ``num_sequences`` this holds for each answer's
    chunks; ``sequence_index`` tells which it is.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    adapter: AdapterRef | None = None
    prompt_tokens: tuple[Token, ...] = ()
    request_id: str = ""
    sequence_index: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """How likely one continuation is.

    Attributes:
        logprob: sum of the natural log-probabilities of its tokens.
        num_tokens: how many tokens it has, to normalise by.
        tokens: each with its log-probability.
    """

    logprob: float
    num_tokens: int
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """One score for each continuation, in the order requested."""

    scores: tuple[Score, ...]
    usage: Usage
    adapter: AdapterRef | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A prompt's token ids, and the text of each on its own."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArtifactPart:
    """One stored artifact of a version: its digest, what its deltas are scaled by, and where it came from.

    ``text_files`` are its files besides config and tensors, such as its own chat template or tokenizer.
    """

    digest: str
    weight: float
    source: str = ""
    text_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One version of a task's adapter, as the server holds it.

    Attributes:
        task_id: the name requests use.
        version: counts up per task, from 1.
        digest: ``sha256:…`` of its files, or of the parts of a composed task.
        method: such as ``lora``; the server's name in lower case.
        state: ``creating``, ``active``, ``inactive``, ``failed`` or ``deleting``.
        residency: the fastest memory that holds it now: ``device``, ``host`` or ``disk``.
        effect: how far it moves the base's log-probabilities, in nats, measured at registration; None if it was not.
        create_time: when it was registered, UTC; None if the server does not say.
        notes: what an operator should know about it, such as files that name no base model.
        parts: the artifacts it is made of; more than one, or one with a weight, if the task is composed.
        kind: what its task does with a text: ``generate``, ``embed``, ``classify``, ``classify_tokens`` or ``span``;
            empty if the server does not say.
        class_labels: the classes that its task tells apart, in order.
        pooling: what its head reads of a text: ``first``, ``last``, ``mean`` or ``max``; empty if it has none, or reads
            each token by itself.
        pinned: whether it stays in the memory of servers.
    """

    task_id: str
    version: int
    digest: str
    method: str
    state: str
    state_reason: str = ""
    size_bytes: int = 0
    num_parameters: int = 0
    source: str = ""
    create_time: datetime | None = None
    base_model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    effect: float | None = None
    residency: str = ""
    notes: tuple[str, ...] = ()
    parts: tuple[ArtifactPart, ...] = ()
    kind: str = ""
    class_labels: tuple[str, ...] = ()
    pooling: str = ""
    pinned: bool = False

    @property
    def name(self) -> str:
        """``task@version``, which names this version in every call."""
        return f"{self.task_id}@{self.version}"


@dataclass(frozen=True, slots=True)
class Registration:
    """The result of registering: the version, and whether this call made it (repeating the same files makes none)."""

    adapter: AdapterInfo
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The most that a server lets callers ask for; None for no limit.

    Attributes:
        max_request_bytes: of one message; the files of an upload come in several.
        max_sequences: that run at once.
        max_waiting: requests that wait; more are refused.
        max_adapters: that requests run on at once; others stay in memory.
        max_continuations: of one ``score``.
        max_artifact_bytes: all files of one adapter.
        max_adapter_rank: of a low-rank delta.
        max_virtual_tokens: of a prefix or a soft prompt.
        max_parts: adapters in a composed task.
        max_transfers: uploads, and downloads of adapters, at a time.
        max_tasks, max_versions_per_task, max_bytes_per_task, max_bytes: of the store.
    """

    max_request_bytes: int
    max_sequences: int
    max_waiting: int
    max_adapters: int
    max_continuations: int
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
class ServerInfo:
    """What a server says about itself; what it does not report is empty, or None.

    Attributes:
        limits: the most that callers may ask for.
        attention: what a token attends to: ``causal`` or ``bidirectional``.
        embedding_size: how many values an embedding has.
        default_pooling: what is read of a text's hidden values, unless its task or its request says otherwise.
        services: full names of what answers on this base model, such as ``manyhats.v1.GenerationService``.
    """

    version: str
    base_model: str
    base_digest: str
    quantization: str
    dtype: str
    device: str
    max_context_length: int
    vocab_size: int
    limits: ServerLimits | None = None
    attention: str = ""
    embedding_size: int = 0
    default_pooling: str = ""
    services: tuple[str, ...] = ()
