"""One request's tokens and KV blocks while it is in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from manyhats.adapters.reserved_labels import EQUAL, Entitlement
from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens


class SequenceStatus(Enum):
    """Where a sequence is; a preempted one is waiting again, a paused one until it is resumed."""

    NEW = "new"
    PAUSED = "paused"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Placement(Protocol):
    """Gives the sequences of an adapter the slot that they run on; the scheduler calls it, between two steps."""

    def can_place(self) -> bool:
        """Whether there is a slot now; rarely, ``place`` still finds none."""
        ...

    def place(self) -> int | None:
        """The slot of a sequence that starts to run, kept for it until ``leave``; None if there is none yet.

        The first call begins what takes time; see ``is_coming``.
        """
        ...

    def is_coming(self) -> bool:
        """Whether there may soon be a slot though no sequence ends: whoever copies an adapter then wakes the caller."""
        ...

    def leave(self) -> None:
        """Note that a placed sequence no longer runs, in no step in flight either."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The only mutable state of a request; only the scheduler changes it. Compared by identity.

    KV index i of the sequence belongs to ``token_ids[i]``. For virtual tokens the caller puts placeholder ids.

    Attributes:
        id: of the job that it belongs to.
        token_ids: prompt, then output.
        max_num_tokens: prompt and output never exceed it.
        cache_key: root of the prefix cache's keys; equal only if equal tokens give equal KV (base digest, adapter
            digest, position offset, salt).
        placement: gives it a slot each time it starts to run; None to keep ``slot``.
        slot: adapter slot while it runs, 0 is the base model.
        task: whose account it is on; empty for the base model.
        entitlement: of the task.
        priority: higher goes first.
        deadline_s: on the scheduler's clock; None for none.
        arrival: among equals, the earlier goes first.
        logits_from: smallest position whose logits are still needed besides the last token's; None if no others are.
            The scheduler advances it as positions are computed, so none comes twice after preemption.
        is_whole: whether all of its tokens run in one step, since they see each other.
        token_types: of its tokens; empty if all are 0.
        leading: virtual tokens that it begins with and that run with the others, whole; None for none.
        reads_hidden: whether final hidden values are needed at these positions, and no logits.
        shared: KV of the first ``shared.num_tokens`` of ``token_ids``; if the scheduler reclaimed it, the sequence
            computes them itself.
        virtual: the virtual tokens it begins with.
        uses_prefix_cache: whether it takes blocks from the prefix cache and leaves its own there.
        is_internal: the engine's own, not a request's; see ``Scheduler``.
        is_bulk: of a scoring that takes several steps; see ``Step``.
        has_waited: its request has already waited for an adapter, so a full queue does not refuse it.
        needs_tokens: whether a step must know the tokens before it, as numbers on the host, to choose its next one.
        is_continuation: of a scoring that has begun, which bounds how many there are: a full queue does not refuse it,
            nor does it count towards one.
        num_prompt_tokens: ``len(token_ids)`` when it was made.
        num_computed_tokens: tokens whose KV is in its blocks, as far as steps are committed.
        num_launched_tokens: those after them that steps in flight compute; counted where the next step is scheduled
            before these are committed.
        num_unknown_tokens: those that steps in flight choose and later ones run; counted in the same case.
        block_table: its blocks in order; while it runs, they cover all its tokens.
        num_cached_tokens: prompt tokens the prefix cache saved at its first admission (not ``shared``'s, nor virtual).
        num_preemptions: how often its blocks were reclaimed.
        num_charged: first tokens that its task was charged for (``Shares``), or that it got without computing them.
        is_long: its prompt takes several steps from where it started, or has many scored rows; see ``Step``.
        num_passed: how many later sequences started while it waited for blocks or a slot.
        block_keys: prefix cache keys of its first blocks, as far as they were needed.
        num_registered_blocks: number of first blocks that the prefix cache knows, or that are not its own.
        drafts: tokens that may follow its own; the next step runs as many of them as there is room for.
    """

    id: str
    token_ids: list[int]
    max_num_tokens: int
    cache_key: bytes = b""
    placement: Placement | None = None
    slot: int = 0
    task: str = ""
    entitlement: Entitlement = EQUAL
    priority: int = 0
    deadline_s: float | None = None
    arrival: float = 0.0
    logits_from: int | None = None
    reads_hidden: bool = False
    is_whole: bool = False
    token_types: tuple[int, ...] = ()
    leading: VirtualTokens | None = None
    shared: SharedPrefix | None = None
    virtual: VirtualTokens | None = None
    uses_prefix_cache: bool = True
    is_internal: bool = False
    is_bulk: bool = False
    has_waited: bool = False
    is_continuation: bool = False
    needs_tokens: bool = False
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_launched_tokens: int = field(default=0, init=False)
    num_unknown_tokens: int = field(default=0, init=False)
    block_table: list[int] = field(default_factory=list, init=False)
    status: SequenceStatus = field(default=SequenceStatus.NEW, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_charged: int = field(default=0, init=False)
    is_long: bool = field(default=False, init=False)
    num_passed: int = field(default=0, init=False)
    block_keys: list[bytes] = field(default_factory=list, init=False, repr=False)
    num_registered_blocks: int = field(default=0, init=False)
    drafts: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_virtual_tokens(self) -> int:
        """P, 0 if it has none."""
        return 0 if self.virtual is None else self.virtual.num_tokens

    @property
    def position_offset(self) -> int:
        """The position of token i is i + position_offset."""
        virtual = self.leading or self.virtual
        return 0 if virtual is None else virtual.position_offset

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Its tokens, with those that steps in flight choose and later ones run."""
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_reached_tokens(self) -> int:
        """How many of them are computed, or will be by steps in flight."""
        return self.num_computed_tokens + self.num_launched_tokens

    @property
    def num_left(self) -> int:
        """Tokens, unknown ones too, that no step computes yet."""
        num_expected = len(self.token_ids) + self.num_unknown_tokens
        return num_expected - self.num_computed_tokens - self.num_launched_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether it runs, and all but its last token, one of the output and known, is computed."""
        is_running = self.status is SequenceStatus.RUNNING and not self.num_unknown_tokens
        return is_running and self.num_left == 1 and self.num_output_tokens > 0

    @property
    def num_scored(self) -> int:
        """Positions whose logits are still needed, besides the last token's."""
        if self.logits_from is None or self.reads_hidden:
            return 0
        return len(self.token_ids) - self.logits_from

    @property
    def is_counted(self) -> bool:
        """Whether it counts towards ``max_waiting`` while it waits."""
        return not (self.is_internal or self.is_continuation)

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output tokens so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens came after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_expected_output_tokens(self) -> int:
        """How many came after the prompt, with those that steps in flight choose and later ones run."""
        return self.num_expected_tokens - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has left the scheduler."""
        return self.status is SequenceStatus.FINISHED
