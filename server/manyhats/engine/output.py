"""What the engine returns: per step while a request runs, and statistics of the step itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import overload

import numpy as np
import numpy.typing as npt

_OUTPUT_BYTES = 500
_TOKEN_BYTES = 500
_TOP_BYTES = 16


class FinishReason(Enum):
    """Why a generation ended. A fault is an error, never a finish reason."""

    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens of a step."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TopTokens(Seq[TopToken]):
    """The most likely tokens of a step, best first; each is built on access.

    Attributes:
        ids: theirs. logprobs: theirs.
        piece: the text of a token.
    """

    ids: array[int]
    logprobs: array[float]
    piece: Callable[[int], str] = field(compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> TopToken: ...

    @overload
    def __getitem__(self, index: slice) -> TopTokens: ...

    def __getitem__(self, index: int | slice) -> TopToken | TopTokens:
        if isinstance(index, slice):
            return TopTokens(self.ids[index], self.logprobs[index], self.piece)
        token_id = self.ids[index]
        return TopToken(token_id, self.piece(token_id), self.logprobs[index])


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One token; ``logprob`` (natural log, raw logits) and ``rank`` (from 1) only if requested."""

    id: int
    text: str
    logprob: float | None = None
    rank: int | None = None
    top: Seq[TopToken] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """A request's usage so far; times in seconds.

    ``draft_tokens`` were computed as guesses of what comes next; ``accepted_draft_tokens`` of them came.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    adapter_load_s: float = 0.0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step, or several, added to one request.

    Attributes:
        text: characters that are certain now; concatenated, they are the whole answer.
        tokens: the new tokens, including EOS and stop; ``text`` may lag behind.
        prompt_tokens: with ``prompt_logprobs``, in the first output only.
        finish_reason: None until the last output.
        usage: so far.
        time_s: when the last step ended, on ``time.monotonic()``'s clock.
        stop: the stop sequence or stop token that ended it; None if something else did.
    """

    text: str
    tokens: tuple[TokenOutput, ...]
    prompt_tokens: tuple[TokenOutput, ...]
    finish_reason: FinishReason | None
    usage: Usage
    time_s: float
    stop: str | int | None = None

    @property
    def num_bytes(self) -> int:
        """Approximate memory it takes while it waits to be sent."""
        size = _OUTPUT_BYTES + len(self.text)
        for tokens in (self.tokens, self.prompt_tokens):
            for token in tokens:
                size += _TOKEN_BYTES + _TOP_BYTES * len(token.top)
        return size


def joined(outputs: Seq[StepOutput]) -> StepOutput:
    """Consecutive outputs of one request as one, at least one."""
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        tokens=tuple(token for output in outputs for token in output.tokens),
        prompt_tokens=tuple(token for output in outputs for token in output.prompt_tokens),
    )


@dataclass(frozen=True, slots=True)
class ScoredContinuation:
    """Sum of the natural log-probabilities of a continuation's tokens."""

    logprob: float
    tokens: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """One scored continuation per requested one, in order."""

    scores: Seq[ScoredContinuation]
    usage: Usage


@dataclass(frozen=True, slots=True, eq=False)
class EncodeOutput:
    """For each text, in order, its pooled values, or what a head makes of them: [1, n]; [tokens, n] if not pooled."""

    values: Seq[npt.NDArray[np.float32]]
    usage: Usage


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine, for metrics; rows count even if they turn out to be needless, as some do one step ahead.

    Attributes:
        duration_s: schedule to commit; where steps overlap, not before the commit of the one before it.
        num_prefill_tokens: prompt tokens computed.
        num_decode_tokens: sequences that decoded one token, or several with drafts.
        num_draft_tokens: drafts that were run after them.
        num_adapters: distinct adapters in the batch, without the base.
        num_preempted: sequences whose blocks were reclaimed.
        prefix_cache_queries: prompt tokens looked up in the prefix cache.
        prefix_cache_hits: those found.
    """

    duration_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_draft_tokens: int
    num_adapters: int
    num_preempted: int
    prefix_cache_queries: int
    prefix_cache_hits: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine, cheap to take from any thread.

    Attributes:
        num_running: sequences that hold KV blocks.
        num_waiting: sequences that wait for a first step, and requests that wait for their adapter or constraint.
        kv_blocks_used: blocks that running sequences or prefixes hold.
        kv_blocks_cached: reusable blocks that still hold a prefix.
        kv_blocks_total: all.
        heartbeat_s: ``time.time()`` of the loop's last turn.
        kv_block_size: positions in each.
        waiting_adapters: names of versions that requests wait for: they are not loaded, or have no slot.
    """

    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    heartbeat_s: float
    kv_block_size: int = 1
    waiting_adapters: tuple[str, ...] = ()
