"""What the jobs of a step want from its chunks, as one ``Wants``, and each one's share of the outcome."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhats.engine.backends.plan import int32
from manyhats.engine.backends.wants import NO_TARGETS, Outcome, Targets, Wants
from manyhats.engine.loop.job import Answer, Job, Want
from manyhats.engine.sampling.sampler import choices_of
from manyhats.engine.scheduling.schedule import Chunk


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A chunk of the step, its logit rows [first, end) or hidden rows, and what its job wants from them."""

    chunk: Chunk
    job: Job[Any]
    first: int
    end: int
    hidden: slice
    want: Want

    @property
    def own_rows(self) -> range:
        """Those of its sequence's own tokens."""
        return range(self.first, self.end - len(self.chunk.drafts))

    @property
    def has_rows(self) -> bool:
        """Whether it has rows of either kind; committing the step changes what its chunk says of that."""
        return self.end > self.first or self.hidden.stop > self.hidden.start

    @property
    def choosing_rows(self) -> range:
        """Those that choose a token."""
        return range(self.end - len(self.want.samples), self.end)


def wants_of(parts: Seq[Part], vocab_size: int) -> Wants:
    """The parts' wants combined, in the order of their rows.

    Args:
        parts: of jobs that go on.
        vocab_size: the model's; a task may have added tokens.
    """
    samples = [row for part in parts for row in part.want.samples]
    choosing_rows = [at for part in parts for at in part.choosing_rows]
    most = max((part.want.vocab_size or 0 for part in parts), default=0)
    return Wants(
        choices=choices_of(samples, choosing_rows, max(most, vocab_size)),
        targets=_targets([part for part in parts if part.want.target_ids]),
        whole=int32([row for part in parts if part.want.whole for row in range(part.first, part.end)]),
    )


def _targets(parts: Seq[Part]) -> Targets:
    """Those of parts that have some."""
    if not parts:
        return NO_TARGETS
    return Targets(
        rows=_int64(part.first + row for part in parts for row in part.want.target_rows),
        ids=_int64(token_id for part in parts for token_id in part.want.target_ids),
        num_top=np.repeat(
            _int64(part.want.num_top for part in parts), [len(part.want.target_ids) for part in parts]
        ),
    )


def answers_of(parts: Iterable[Part], outcome: Outcome) -> list[tuple[Part, Answer]]:
    """Each part's share of the joint outcome."""
    tokens, targets = iter(outcome.tokens), iter(outcome.targets)
    answers: list[tuple[Part, Answer]] = []
    num_whole = 0
    for part in parts:
        num_rows = part.end - part.first if part.want.whole else 0
        chosen = [next(tokens) for _ in part.want.samples]
        answer = Answer(
            tokens=chosen[: _num_finite(part.choosing_rows, outcome.bad_rows)],
            targets=[(token_id, next(targets)) for token_id in part.want.target_ids],
            whole=outcome.whole[num_whole : num_whole + num_rows],
            hidden=outcome.hidden[part.hidden],
        )
        answers.append((part, answer))
        num_whole += num_rows
    return answers


def _num_finite(rows: range, bad_rows: AbstractSet[int]) -> int:
    """How many of these rows come before the first bad one."""
    return next((index for index, row in enumerate(rows) if row in bad_rows), len(rows))


def _int64(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64)
