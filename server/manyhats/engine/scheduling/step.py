"""A schedule being built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.policy import Rank
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.virtual_tokens import PrefixFill

_INTERNAL_TOKENS = 3
"""This many make a step of one decode a quarter longer; each two further decodes allow for one more."""


@dataclass(slots=True)
class Step:
    """A schedule being built: who gets how many of the step's tokens.

    Decodes come first. Internal sequences and short prompts share what is left by rank, and *bulk* ones get the rest:
    scorings and prompts that take several steps, or have many rows whose logits are scored. Beside others these get few
    tokens, so that a step does not grow by much, but never none. One that will be done sooner gets its tokens first;
    half of them are for the first in rank, so that it also finishes eventually.

    Attributes:
        budget: tokens that are left.
        max_bulk: tokens of bulk sequences in a step with one decode; each two further decodes allow for one more.
        rank: of a sequence.
        bulk_limit: how many of them a step beside so many decodes may have, by how long they take; None if unknown.
        hopeless: waiting sequences that cannot meet their deadlines.
        without_slot: sequences that wait for a slot, by rank.
        are_slots_reserved: whether one of them has waited long enough: nothing after it gets a slot.
        is_ahead: whether another step is in flight, so that blocks given up now are not free yet.
        lacks_room: whether something could start if blocks that are given up were free at once.
    """

    budget: int
    max_bulk: int
    rank: Callable[[Sequence], Rank]
    bulk_limit: Callable[[int], int | None]
    is_ahead: bool = False
    chunks: list[Chunk] = field(default_factory=list)
    prefix_fills: list[PrefixFill] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    prefixes: set[SharedPrefix] = field(default_factory=set)  # that it starts from
    started: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    hopeless: list[Sequence] = field(default_factory=list)
    without_slot: list[Sequence] = field(default_factory=list)
    are_slots_reserved: bool = False
    lacks_room: bool = False
    num_queries: int = 0
    num_hits: int = 0
    _num_decodes: int = 0
    _internal_budget: int = 0
    _bulk: list[Sequence] = field(default_factory=list)
    _reserved: int = 0  # for them

    @property
    def room(self) -> int:
        """Tokens that are left for others than bulk sequences."""
        return self.budget - self._reserved

    def go_on(self, running: Iterable[Sequence]) -> None:
        """Give tokens to running sequences, in the order of rank."""
        prefills: list[Sequence] = []
        for sequence in running:
            num_left = sequence.num_left
            if num_left == 1 and not sequence.is_internal and not sequence.is_bulk:
                self._add(sequence, 1)
            elif num_left > 0:
                prefills.append(sequence)
        self._num_decodes = len(self.chunks)
        self._internal_budget = _INTERNAL_TOKENS + self._num_decodes // 2 if self.chunks else self.budget
        for sequence in sorted(prefills, key=lambda each: not (each.is_bulk or each.is_long)):
            self.start(sequence)

    def start(self, sequence: Sequence) -> None:
        """Give tokens to a sequence that has blocks for them; bulk ones get theirs in ``run_bulk``."""
        if sequence.is_whole:
            if self.has_whole_room(sequence):
                self._add(sequence, sequence.num_left)
            return
        if sequence.is_bulk or sequence.is_long:
            if not self._bulk:
                self._reserved = min(self.max_bulk, max(1, self.budget // 2))
            self._bulk.append(sequence)
            return
        num_tokens = min(sequence.num_left, self.room)
        if sequence.is_internal:
            num_tokens = min(num_tokens, max(1, self._internal_budget))
            self._internal_budget -= num_tokens
        if num_tokens > 0:
            self._add(sequence, num_tokens)

    def has_whole_room(self, sequence: Sequence) -> bool:
        """Whether a sequence that runs whole may do so in this step: it fits, or nothing else runs."""
        return sequence.num_left <= self.budget or not self.chunks

    def has_bulk_room(self, sequence: Sequence, num_left: int, *, are_others_waiting: bool) -> bool:
        """Whether a bulk sequence with this many tokens would get any in this step."""
        room = self._bulk_budget(are_others_waiting) - sum(other.num_left for other in self._bulk)
        return (
            room > 0
            or all(num_left < other.num_left for other in self._bulk)
            or all(self.rank(sequence) < self.rank(other) for other in self._bulk)
        )

    def put_off(self, exceeds_share: Callable[[Sequence], bool]) -> bool:
        """Leave out what tasks run beyond their shares, if it is most of the step and the prompt of another begins.

        A first token then waits for few rows. Returns whether anything was left out; it runs in the next step.
        """
        prompts = [
            chunk.sequence
            for chunk in self.chunks
            if not (chunk.is_decode or chunk.is_bulk or chunk.sequence.is_internal)
        ]
        if all(map(exceeds_share, prompts)):  # as in most steps, which have none
            return False
        kept = [chunk for chunk in self.chunks if not exceeds_share(chunk.sequence)]
        num_kept = sum(chunk.is_decode for chunk in kept)
        num_left_out = sum(chunk.is_decode for chunk in self.chunks) - num_kept
        if 2 * num_left_out <= self._num_decodes:
            return False
        self.chunks, self._num_decodes = kept, num_kept
        return True

    def run_bulk(self) -> None:
        """Give bulk sequences what they get, once the others have theirs."""
        budget = self._bulk_budget()
        if not self._bulk:
            return
        first = min(self._bulk, key=self.rank)
        shares = {first: min(first.num_left, -(-budget // 2))}
        budget -= shares[first]
        for sequence in sorted(self._bulk, key=lambda sequence: (sequence.num_left, self.rank(sequence))):
            share = shares.get(sequence, 0)
            more = min(sequence.num_left - share, budget)
            shares[sequence] = share + more
            budget -= more
        for sequence, share in shares.items():
            if share > 0:
                self._add(sequence, share)

    def freeze(self) -> Schedule:
        """The schedule."""
        return Schedule(
            tuple(self.chunks),
            tuple(self.prefix_fills),
            tuple(self.block_copies),
            tuple(self.started),
            tuple(self.preempted),
            tuple(self.hopeless),
            self.num_queries,
            self.num_hits,
        )

    def _bulk_budget(self, are_others_waiting: bool = False) -> int:
        if self.chunks or are_others_waiting:
            limit = self.bulk_limit(self._num_decodes)
            most = self.max_bulk + self._num_decodes // 2
            return min(self.budget, most if limit is None else min(most, limit))
        return self.budget

    def _add(self, sequence: Sequence, num_tokens: int) -> None:
        self.chunks.append(Chunk(sequence, sequence.num_reached_tokens, num_tokens))
        self.budget -= num_tokens
