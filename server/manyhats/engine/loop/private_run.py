"""An internal prompt: it runs alongside requests, and a thread waits for its result."""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.wants import Logits
from manyhats.engine.errors import NumericalError
from manyhats.engine.loop.job import Answer, Want
from manyhats.engine.scheduling.schedule import Chunk
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.virtual_tokens import PLACEHOLDER_ID, VirtualTokens


class PrivateRun:
    """A ``Job`` whose one output is the logits [T, V] of a prompt's T tokens, or on an encoder their hidden values.

    Args:
        job_id: unique.
        token_ids: the prompt, after the adapter's virtual tokens.
        slot: reserved for it.
        virtual: the virtual tokens it begins with.
        is_whole: whether the base is an encoder.
    """

    def __init__(
        self,
        job_id: str,
        token_ids: tuple[int, ...],
        slot: int = 0,
        virtual: VirtualTokens | None = None,
        *,
        is_whole: bool = False,
    ) -> None:
        self.id = job_id
        self.deadline_s: float | None = None
        self.is_done = False
        num_virtual = 0 if virtual is None else virtual.num_tokens
        self._rows: list[Logits] = []
        self._sequence = Sequence(
            id=job_id,
            token_ids=[PLACEHOLDER_ID] * num_virtual + list(token_ids),
            max_num_tokens=num_virtual + len(token_ids),
            slot=slot,
            logits_from=num_virtual,
            virtual=virtual,
            uses_prefix_cache=False,
            is_internal=True,
            is_whole=is_whole,
            reads_hidden=is_whole,
        )
        if is_whole and virtual is not None and virtual.embeddings is not None:
            self._sequence.leading, self._sequence.virtual = virtual, None

    def next(self, scheduler: Scheduler, now_s: float) -> None:
        """Queue the prompt, once."""
        if self._sequence.status is SequenceStatus.NEW:
            scheduler.add(self._sequence)

    def wants(self, chunk: Chunk) -> Want:
        """The logits of every token, unless hidden values are read."""
        return Want(whole=not self._sequence.reads_hidden)

    def take(self, chunk: Chunk, answer: Answer, scheduler: Scheduler, now_s: float) -> Logits | None:
        """Keep them until all of it has run."""
        rows = answer.hidden if self._sequence.reads_hidden else answer.whole
        if not np.isfinite(rows).all():
            raise NumericalError("the values are not finite")
        self._rows.append(rows)
        if not chunk.ends_tokens:
            return None
        self.is_done = True
        scheduler.finish(chunk.sequence)
        return np.concatenate(self._rows)

    def drop(self, scheduler: Scheduler) -> None:
        """Free the sequence's blocks."""
        scheduler.finish(self._sequence, is_answered=False)
