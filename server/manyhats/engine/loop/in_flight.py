"""A step that is launched, until its outcome is collected."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass

from manyhats.engine.backends.backend import Pending
from manyhats.engine.loop.parts import Part
from manyhats.engine.output import StepStats
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class StepInFlight:
    """A launched step.

    Attributes:
        schedule: what it computes.
        parts: its chunks, but for those of jobs that had ended when it was launched.
        pending: its outcome.
        began_s: when its turn began, on the monotonic clock.
    """

    schedule: Schedule
    parts: Seq[Part]
    pending: Pending
    began_s: float

    @property
    def choices(self) -> Mapping[Sequence, int]:
        """Which choice of the step's ``Wants`` is the next token of each sequence that gets one."""
        first: dict[Sequence, int] = {}
        num_choices = 0
        for part in self.parts:
            if part.want.samples:
                first[part.chunk.sequence] = num_choices
                num_choices += len(part.want.samples)
        return first

    def wait(self) -> None:
        """Wait for its end, whatever that is."""
        with suppress(BaseException):
            self.pending.result()

    def stats(self, duration_s: float) -> StepStats:
        """What it did, and how long it took."""
        schedule = self.schedule
        num_decode = sum(chunk.is_decode for chunk in schedule.chunks)
        return StepStats(
            duration_s=duration_s,
            num_prefill_tokens=schedule.num_tokens - schedule.num_drafts - num_decode,
            num_decode_tokens=num_decode,
            num_draft_tokens=schedule.num_drafts,
            num_adapters=len({chunk.sequence.slot for chunk in schedule.chunks} - {0}),
            num_preempted=len(schedule.preempted),
            prefix_cache_queries=schedule.prefix_cache_queries,
            prefix_cache_hits=schedule.prefix_cache_hits,
        )
