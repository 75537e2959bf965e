"""What the scheduler gives the engine for one step, and the limits it observes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhats.engine.errors import FieldInvalidError

if TYPE_CHECKING:
    from manyhats.engine.scheduling.sequence import Sequence
    from manyhats.engine.scheduling.virtual_tokens import PrefixFill


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence, to be run in this step.

    Attributes:
        sequence: theirs.
        start: position of the first.
        num_tokens: of the sequence's own.
        drafts: tokens that are run after its last, since they may be the next ones.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """One past the position of its last own token."""
        return self.start + self.num_tokens

    @property
    def num_rows(self) -> int:
        """Rows of the step: its own tokens and drafts."""
        return self.num_tokens + len(self.drafts)

    @property
    def ends_tokens(self) -> bool:
        """Whether it reaches the sequence's last token, whose row samples; ask before appending the next."""
        return self.start + self.num_tokens == self.sequence.num_expected_tokens

    @property
    def num_result_rows(self) -> int:
        """How many of its last rows are needed: drafts, the one that ends the tokens, and those that are read."""
        last = self.num_tokens - 1 if self.ends_tokens else self.num_tokens
        scored = self.sequence.logits_from
        first = last if scored is None else min(last, max(0, scored - self.start))
        return self.num_rows - first

    @property
    def num_logit_rows(self) -> int:
        """How many of them need logits: none if the sequence reads hidden values."""
        return 0 if self.sequence.reads_hidden else self.num_result_rows

    @property
    def is_decode(self) -> bool:
        """Whether it is a single output token and drafts, rather than part of a prompt or a recomputation."""
        return self.num_tokens == 1 and self.start >= self.sequence.num_prompt_tokens

    @property
    def is_bulk(self) -> bool:
        """Whether it is of a bulk sequence's tokens, see ``Step``; a long prompt's answer is not bulk."""
        return self.sequence.is_bulk or (self.sequence.is_long and not self.is_decode)


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """One step.

    Attributes:
        chunks: at most one per sequence, decodes first.
        prefix_fills: stored virtual tokens, written before anything else.
        block_copies: (source, destination) blocks, copied whole before anything in the step is computed.
        started: sequences that begin in it, whether or not they have a chunk yet.
        preempted: sequences whose blocks were reclaimed; they wait again.
        hopeless: sequences that wait, and cannot meet their deadlines if they start now; the caller ends them.
        prefix_cache_queries: prompt tokens looked up for sequences that started.
        prefix_cache_hits: those found.
    """

    chunks: tuple[Chunk, ...] = ()
    prefix_fills: tuple[PrefixFill, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()
    started: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    hopeless: tuple[Sequence, ...] = ()
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def num_drafts(self) -> int:
        """Those that are drafts."""
        return sum(len(chunk.drafts) for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    Attributes:
        max_num_sequences: sequences that hold blocks at a time.
        max_num_batched_tokens: tokens of a step; at least ``max_num_sequences``, so that decodes always leave
            a token for a sequence in prefill.
        max_waiting: sequences that may wait.
        max_waiting_tokens: of their prompts, unless only one waits.
        max_bulk_tokens: tokens of scorings and of prompts that take several steps, in a step shared with other
            sequences.
        max_draft_rows: rows up to which drafts may fill a step; half as many if not all of its sequences have any.
    """

    max_num_sequences: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    max_waiting_tokens: int = 1_048_576
    max_bulk_tokens: int = 8
    max_draft_rows: int = 8

    def __post_init__(self) -> None:
        for name in ("max_num_sequences", "max_waiting", "max_waiting_tokens", "max_bulk_tokens"):
            if getattr(self, name) < 1:
                raise FieldInvalidError(f"scheduler.{name}", f"must be at least 1, not {getattr(self, name)}")
        if self.max_draft_rows < 0:
            raise FieldInvalidError(
                "scheduler.max_draft_rows", f"must be 0 or more, not {self.max_draft_rows}"
            )
        if self.max_num_batched_tokens < self.max_num_sequences:
            raise FieldInvalidError(
                "scheduler.max_num_batched_tokens",
                f"must be at least max_num_sequences = {self.max_num_sequences}, "
                f"not {self.max_num_batched_tokens}",
            )

    def is_bulk(self, sequence: Sequence, num_left: int) -> bool:
        """Whether a sequence with this many tokens to compute is a bulk one (``Step``)."""
        is_long = num_left > self.max_num_batched_tokens
        if sequence.is_whole:
            return False
        is_scored = sequence.num_scored > self.max_bulk_tokens
        return sequence.is_bulk or ((is_long or is_scored) and not sequence.is_internal)
