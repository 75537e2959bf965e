"""What the engine does for one request: the interface between its loop and generations or scorings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from manyhats.engine.backends.backend import Kernels
from manyhats.engine.backends.logprobs import TokenLogprob
from manyhats.engine.errors import EngineError
from manyhats.engine.output import ScoreOutput, StepOutput, TokenOutput, TopTokens
from manyhats.engine.sampling.sampler import SamplingRow
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.text.tokenizer import Tokenizer

Output = StepOutput | ScoreOutput


@dataclass(frozen=True, slots=True)
class Event:
    """Something a request's caller must be told; ``is_last`` ends the request."""

    job_id: str
    payload: Output | EngineError
    is_last: bool


class Job(Protocol):
    """One request in the engine, a generation or a scoring. Lives on the engine's thread.

    Attributes:
        id: the engine's own, unique.
        deadline_s: on the monotonic clock; None for none.
        is_done: whether its last output has been given.
        samples: whether a token is sampled after a sequence's last; else all its logits are scored.
    """

    id: str
    deadline_s: float | None
    is_done: bool
    samples: bool

    def start(self, scheduler: Scheduler) -> None:
        """Queues its first sequence.

        Raises:
            EngineError: it cannot be queued.
        """
        ...

    def tick(self, scheduler: Scheduler, now_s: float) -> Output | None:
        """Between steps: queues more sequences, or ends by the clock."""
        ...

    def begin(self, sequence: Sequence, now_s: float) -> None:
        """A chunk of one of its sequences is about to run."""
        ...

    def sampling_row(self, sequence: Sequence) -> SamplingRow:
        """How to sample after the sequence's last token, where the job samples."""
        ...

    def score(
        self, sequence: Sequence, first_position: int, logits: Tensor, kernels: Kernels[Any, Any]
    ) -> None:
        """Takes the logits [n, V] of positions first_position … that ``logits_from`` asked for."""
        ...

    def commit(
        self, sequence: Sequence, sampled: SampledToken | None, scheduler: Scheduler, now_s: float
    ) -> Output | None:
        """All tokens of a sequence are computed and committed, and the next one is sampled if it asked for it."""
        ...

    def abort(self, scheduler: Scheduler) -> None:
        """Lets go of everything it holds in the scheduler. Safe to repeat."""
        ...


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token chosen for one sequence; ``logprob`` where it was asked for."""

    id: int
    logprob: TokenLogprob | None


def token_output(tokenizer: Tokenizer, token_id: int, logprob: TokenLogprob | None) -> TokenOutput:
    """A token with its text, and its log-probabilities where there are any."""
    text = tokenizer.piece(token_id)
    if logprob is None:
        return TokenOutput(token_id, text)
    top = TopTokens(logprob.top_ids, logprob.top_logprobs, tokenizer.piece) if logprob.top_ids else ()
    return TokenOutput(token_id, text, logprob.logprob, logprob.rank, top)
