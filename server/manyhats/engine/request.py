"""Requests to the engine: frozen, and checked on creation.

Collections are counted before they are copied: millions of values would hold up everybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling
from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import FieldInvalidError

if TYPE_CHECKING:
    from manyhats.engine.text.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 100
MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_CONTINUATIONS = 1024
MAX_INPUTS = 1024
MAX_CACHE_SALT_LENGTH = 256
MAX_DRAFT_TOKENS = 16


def _check_count(name: str, values: Sized, limit: int) -> None:
    if len(values) > limit:
        raise FieldInvalidError(name, f"has {len(values)}; the limit is {limit}")


def _check_salt(cache_salt: str) -> None:
    if len(cache_salt) > MAX_CACHE_SALT_LENGTH:
        raise FieldInvalidError("cache_salt", f"the limit is {MAX_CACHE_SALT_LENGTH} characters")


def _check_priority(priority: int) -> None:
    if not -(2**31) <= priority < 2**31:
        raise FieldInvalidError("priority", f"must be in [-2^31, 2^31), not {priority}")


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not math.isfinite(value) or not inside:
        left = "(" if open_low else "["
        raise FieldInvalidError(name, f"must be a finite number in {left}{low:g}, {high:g}], not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy.

    Applied in this order to the raw float32 logits: ``logit_bias``, repetition, presence and frequency
    penalties, temperature, ``top_k``, ``top_p``, ``min_p``, ``typical_p``.

    Attributes:
        temperature: divides the logits; 0 chooses the most likely token.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the smallest set of tokens with at least this probability mass.
        min_p: keeps tokens with at least this fraction of the most likely token's probability.
        typical_p: the mass of locally typical sampling (Meister et al. 2022, arXiv:2202.00666).
        repetition_penalty: over prompt and output tokens (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: subtracted once from tokens already in the output.
        frequency_penalty: subtracted per occurrence in the output.
        seed: makes the row reproducible, whatever else is in the batch; None draws one.
        logit_bias: token id → added to its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _check_range("sampling.temperature", self.temperature, 0.0, 100.0)
        _check_range("sampling.top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("sampling.min_p", self.min_p, 0.0, 1.0)
        _check_range("sampling.typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _check_range("sampling.repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("sampling.presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("sampling.frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.top_k < 0:
            raise FieldInvalidError("sampling.top_k", f"must be 0 (all) or more, not {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise FieldInvalidError("sampling.seed", f"must be in [0, 2^64), not {self.seed}")
        _check_count("sampling.logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))
        for value in self.logit_bias.values():
            _check_range("sampling.logit_bias", value, -1e4, 1e4)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a generation ends.

    Attributes:
        max_new_tokens: at least 1.
        min_new_tokens: until then, EOS, stop tokens and stop sequences do not end it.
        stop_sequences: texts that end it, however they are split into tokens; searched for in the text including the
            literals of special tokens, whether or not the answer shows those.
        stop_token_ids: token ids that end it.
        include_stop_sequence: whether the text keeps the stop that ended it.
        ignore_eos: treats EOS as an ordinary token.
        time_limit_s: wall time since the request was accepted; whatever was generated by then is the answer.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop_sequences: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_sequence: bool = False
    ignore_eos: bool = False
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FieldInvalidError(
                "stopping.max_new_tokens", f"must be at least 1, not {self.max_new_tokens}"
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise FieldInvalidError(
                "stopping.min_new_tokens",
                f"must be in [0, max_new_tokens = {self.max_new_tokens}], not {self.min_new_tokens}",
            )
        _check_count("stopping.stop_sequences", self.stop_sequences, MAX_STOP_SEQUENCES)
        _check_count("stopping.stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        object.__setattr__(self, "stop_sequences", tuple(self.stop_sequences))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for text in self.stop_sequences:
            if not 1 <= len(text) <= MAX_STOP_SEQUENCE_LENGTH:
                raise FieldInvalidError(
                    "stopping.stop_sequences",
                    f"each must have 1 to {MAX_STOP_SEQUENCE_LENGTH} characters, one has {len(text)}",
                )
        if self.time_limit_s is not None:
            _check_range("stopping.time_limit_ms", self.time_limit_s * 1000, 0.0, 86_400_000.0, open_low=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """What to return besides the text.

    Attributes:
        logprobs: each output token's log-probability and rank.
        top_logprobs: this many of the most likely tokens at each step; no effect without ``logprobs``.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: whether the text leaves special tokens out; otherwise it has their literals.
    """

    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise FieldInvalidError(
                "response.top_logprobs", f"must be in [0, {MAX_TOP_LOGPROBS}], not {self.top_logprobs}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationParams:
    """How far ahead an answer is guessed, from its prompt and itself; guesses are checked, and change no answer.

    Attributes:
        num_tokens: guessed in one step, at most; 0 for none.
    """

    num_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_tokens <= MAX_DRAFT_TOKENS:
            raise FieldInvalidError(
                "speculation.num_tokens", f"must be in [0, {MAX_DRAFT_TOKENS}], not {self.num_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for one generation.

    Attributes:
        id: unique among the requests in flight.
        prompt_token_ids: at least one.
        adapter: the adapter version that all its tokens run on; None for the base model.
        tokenizer: the adapter's own; None for the base's.
        constraint: the language that the answer must be in; None for any text.
        speculation: how far ahead to guess.
        priority: higher goes first.
        deadline_s: on ``time.monotonic()``'s clock; past it the request fails.
        cache_salt: keeps its KV blocks apart from requests with another salt.
        accepted_s: when it was accepted, on the same clock.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    adapter: AdapterRecord | None = None
    tokenizer: Tokenizer | None = None
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingParams = StoppingParams()
    response: ResponseOptions = ResponseOptions()
    constraint: Constraint | None = None
    speculation: SpeculationParams = SpeculationParams()
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    accepted_s: float = 0.0

    def __post_init__(self) -> None:
        _check_salt(self.cache_salt)
        _check_priority(self.priority)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest:
    """A request for what is read in texts.

    Attributes:
        inputs: token ids of each text.
        token_types: types of each text's tokens, for bases that have them; empty if all are 0.
        pooling: of its hidden rows; None for the task's head's, or else the base's.
        applies_head: whether the task's head is applied.

    The other fields are as in ``Request``.
    """

    id: str
    inputs: tuple[tuple[int, ...], ...]
    token_types: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None
    applies_head: bool = True
    adapter: AdapterRecord | None = None
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    accepted_s: float = 0.0

    def __post_init__(self) -> None:
        _check_salt(self.cache_salt)
        _check_priority(self.priority)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts together."""
        return sum(len(token_ids) for token_ids in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A request for the log-probability of each continuation of one prompt.

    Attributes:
        continuations: token ids, each at least one.
        num_given: how many of each one's first tokens are not scored, since they still belong to its prompt; fewer than
            all. Empty means none.

    The other fields are as in ``Request``.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    num_given: tuple[int, ...] = ()
    adapter: AdapterRecord | None = None
    tokenizer: Tokenizer | None = None
    response: ResponseOptions = ResponseOptions()
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    accepted_s: float = 0.0

    def __post_init__(self) -> None:
        _check_salt(self.cache_salt)
        _check_priority(self.priority)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and all continuations together."""
        return len(self.prompt_token_ids) + sum(len(continuation) for continuation in self.continuations)
