"""The interface between the engine's loop and its generations and scorings."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from manyhats.engine.backends.wants import Hidden, Logits, Token, TokenLogprob
from manyhats.engine.output import TokenOutput, TopTokens
from manyhats.engine.sampling.sampler import SamplingRow
from manyhats.engine.scheduling.schedule import Chunk
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Event:
    """What a request's caller must be told: an output or an ``EngineError``; ``is_last`` ends the request."""

    job_id: str
    payload: Any
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Want:
    """What a job wants from a chunk's logit rows.

    Attributes:
        samples: how its last rows choose tokens: that of its last own token and those of drafts; empty if none does.
        target_rows: [T], rows of given tokens whose log-probabilities are wanted, counted from the chunk's first.
        target_ids: [T], the tokens.
        num_top: how many of the row's most likely tokens to return with each.
        whole: whether to return the logits.
        vocab_size: of the task; None if it is the base's.
    """

    samples: Seq[SamplingRow] = ()
    target_rows: Seq[int] = ()
    target_ids: Seq[int] = ()
    num_top: int = 0
    whole: bool = False
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """The result of a ``Want``.

    Attributes:
        tokens: the chosen tokens, in the order of ``samples``; they end before the first draft whose row is not finite.
        targets: each of ``target_ids`` with its log-probability.
        whole: [rows, V], or no row.
        hidden: [rows, E], of a sequence that reads hidden values.
    """

    tokens: Seq[Token]
    targets: Seq[tuple[int, TokenLogprob]]
    whole: Logits
    hidden: Hidden = field(default_factory=lambda: np.empty((0, 0), np.float32))


OutputT = TypeVar("OutputT", covariant=True)


class Job(Protocol[OutputT]):
    """One request in the engine, a generation or a scoring. Lives on the engine's thread.

    Attributes:
        id: assigned by the engine, unique.
        deadline_s: on the monotonic clock; None for none.
        is_done: whether its last output has been sent.
    """

    id: str
    deadline_s: float | None
    is_done: bool

    def next(self, scheduler: Scheduler, now_s: float) -> OutputT | None:
        """Called before each step: queue sequences, the first at the first call, or end at a time limit.

        Raises:
            EngineError: it cannot continue.
        """
        ...

    def wants(self, chunk: Chunk) -> Want:
        """Called when a chunk of one of its sequences is about to run."""
        ...

    def take(self, chunk: Chunk, answer: Answer, scheduler: Scheduler, now_s: float) -> OutputT | None:
        """Called when a chunk with rows that are needed has run and is committed."""
        ...

    def drop(self, scheduler: Scheduler) -> None:
        """Release everything it holds in the scheduler. Safe to repeat."""
        ...


def token_output(tokenizer: Tokenizer, token_id: int, logprob: TokenLogprob | None) -> TokenOutput:
    """A token with its text, and its log-probabilities if there are any."""
    text = tokenizer.piece(token_id)
    if logprob is None:
        return TokenOutput(token_id, text)
    top = TopTokens(logprob.top_ids, logprob.top_logprobs, tokenizer.piece) if logprob.top_ids else ()
    return TokenOutput(token_id, text, logprob.logprob, logprob.rank, top)
