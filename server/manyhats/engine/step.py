"""A schedule in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from manyhats.engine.blocks import SharedPrefix
from manyhats.engine.prefix import PrefixFill
from manyhats.engine.schedule import Chunk, Schedule
from manyhats.engine.sequence import Sequence


@dataclass(slots=True)
class Step:
    """A schedule in the making: what is left of the step's tokens, and of those for internal sequences."""

    budget: int
    internal_budget: int
    chunks: list[Chunk] = field(default_factory=list)
    prefix_fills: list[PrefixFill] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    prefixes: set[SharedPrefix] = field(default_factory=set)  # that it starts from
    preempted: list[Sequence] = field(default_factory=list)
    num_queries: int = 0
    num_hits: int = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Run the next tokens of a sequence."""
        self.chunks.append(Chunk(sequence, sequence.num_computed_tokens, num_tokens))
        self.budget -= num_tokens

    def add_prefill(self, sequence: Sequence) -> None:
        """Run as many of its tokens as there is room for."""
        num_tokens = min(len(sequence.token_ids) - sequence.num_computed_tokens, self.budget)
        if sequence.is_internal:
            num_tokens = min(num_tokens, max(1, self.internal_budget))
            self.internal_budget -= num_tokens
        self.add(sequence, num_tokens)

    def freeze(self) -> Schedule:
        """The schedule."""
        return Schedule(
            tuple(self.chunks),
            tuple(self.prefix_fills),
            tuple(self.block_copies),
            tuple(self.preempted),
            self.num_queries,
            self.num_hits,
        )
