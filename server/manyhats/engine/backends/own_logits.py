"""Logits of rows whose task has a vocabulary of its own: more tokens than the base, or fewer.

They are computed and chosen from apart, in as many columns as the task has tokens. So no row of another task has a
column for them, and what another row is does not depend, to the bit, on whether such a row is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.backend import Pending
from manyhats.engine.backends.choosing import Chooser
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.wants import Array, Choices, Outcome, Targets, Token, TokenLogprob, Wants


@dataclass(frozen=True, slots=True, eq=False)
class OwnRows:
    """Rows of one vocabulary.

    Attributes:
        rows: [m] int64, which of the step's logit rows they are.
        values: [m, n] float32, their logits.
    """

    rows: Array
    values: Tensor


def resized(logits: Tensor, vocab_size: int) -> Tensor:
    """A copy of logits [m, V] with ``vocab_size`` columns, those beyond V still 0."""
    common = min(logits.shape[1], vocab_size)
    values = logits.new_zeros(logits.shape[0], vocab_size)
    values[:, :common] = logits[:, :common]
    return values


@torch.inference_mode()
def finish_apart(
    own: Sequence[OwnRows],
    vocab_size: int,
    chooser: Chooser,
    wants: Wants,
    finish_rest: Callable[[Wants], Outcome],
) -> Outcome:
    """What is wanted from each group of rows, and from the rest, as one outcome in the order of ``wants``.

    Args:
        own: the groups, on the host.
        vocab_size: V, the base's.
        chooser: of the backend.
        wants: from all rows.
        finish_rest: computes what is wanted from the other rows, whose logits have the base's columns.
    """
    vocabularies = Vocabularies.of(own, vocab_size, wants)
    return vocabularies.joined(
        [
            finish_rest(part) if group is None else HostLogits(group.values, chooser).finish(part).outcome
            for group, part in vocabularies.wants
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Vocabularies:
    """What is wanted of a step, divided by vocabulary.

    Attributes:
        wants: what is wanted of the rest, whose group is None, then of each group, with rows numbered within it.
    """

    wants: Sequence[tuple[OwnRows | None, Wants]]
    _all: Wants
    _parts: Sequence[_Part]

    @classmethod
    def of(cls, own: Sequence[OwnRows], vocab_size: int, wants: Wants) -> Vocabularies:
        """See ``finish_apart``."""
        all_own = np.concatenate([group.rows for group in own])
        rest = _Part.of(wants, lambda rows: ~np.isin(rows, all_own))
        parts = [_Part.of(wants, lambda rows, group=group: np.isin(rows, group.rows)) for group in own]  # type: ignore[misc]
        divided: list[tuple[OwnRows | None, Wants]] = [(None, _fitted(rest.wants, vocab_size))]
        divided += [(group, _renumbered(part.wants, group)) for group, part in zip(own, parts, strict=True)]
        return cls(divided, wants, [rest, *parts])

    @property
    def places(self) -> Sequence[Array]:
        """Which of the choices each of ``wants`` has."""
        return [part.choices for part in self._parts]

    def joined(self, outcomes: Sequence[Outcome]) -> Outcome:
        """The outcomes of ``wants``, in their order, as one in the order of what was wanted first."""
        wants, rest = self._all, outcomes[0]
        parts = list(zip(self._parts, outcomes, strict=True))
        tokens: dict[int, Token] = {}
        targets: dict[int, TokenLogprob] = {}
        for part, found in parts:
            tokens |= dict(zip(part.choices.tolist(), found.tokens, strict=True))
            targets |= dict(zip(part.targets.tolist(), found.targets, strict=True))
        return Outcome(
            tokens=[tokens[place] for place in range(wants.choices.num_rows)],
            targets=[targets[place] for place in range(len(wants.targets.ids))],
            whole=_whole(wants, parts),
            bad_rows=self._bad_rows(outcomes),
            hidden=rest.hidden,
        )

    def _bad_rows(self, outcomes: Sequence[Outcome]) -> frozenset[int]:
        bad = set(outcomes[0].bad_rows)
        groups = [group for group, _ in self.wants if group is not None]
        for group in groups:
            bad -= set(group.rows.tolist())
        for group, found in zip(groups, outcomes[1:], strict=True):
            bad |= {int(group.rows[row]) for row in found.bad_rows}
        return frozenset(bad)


@dataclass(frozen=True, slots=True, eq=False)
class PendingParts:
    """``Pending`` of several vocabularies; ``parts`` are those of ``vocabularies.wants``."""

    vocabularies: Vocabularies
    parts: Sequence[Pending]

    def result(self) -> Outcome:
        """Wait, and put them together."""
        return self.vocabularies.joined([part.result() for part in self.parts])


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A part of what is wanted: the places of its choices, targets and whole rows among all."""

    wants: Wants
    choices: Array
    targets: Array
    whole: Array

    @classmethod
    def of(cls, wants: Wants, is_in: Callable[[Array], Array]) -> _Part:
        choices, targets, whole = (
            np.flatnonzero(is_in(rows)) for rows in (wants.choices.rows, wants.targets.rows, wants.whole)
        )
        given = wants.targets
        part = Wants(
            choices=_selected(wants.choices, choices),
            targets=Targets(given.rows[targets], given.ids[targets], given.num_top[targets]),
            whole=wants.whole[whole],
        )
        return cls(part, choices, targets, whole)


_OF_EDITS = ("edit_ids", "edit_bias", "edit_seen", "edit_counts")


def _selected(choices: Choices, places: Array) -> Choices:
    """Some rows of choices, with their edits; masks stay, all of them."""
    counts = np.diff(choices.edit_start)
    is_kept = np.zeros(choices.num_rows, dtype=np.bool_)
    is_kept[places] = True
    edits = np.flatnonzero(np.repeat(is_kept, counts))
    start = np.zeros(len(places) + 1, dtype=np.int64)
    np.cumsum(counts[places], out=start[1:])
    changes = {name: getattr(choices, name)[edits] for name in _OF_EDITS}
    for field in fields(choices):
        if field.name not in (*_OF_EDITS, "edit_start", "masks"):
            changes[field.name] = getattr(choices, field.name)[places]
    used = changes["mask_rows"]
    kept, numbers = np.unique(used[used >= 0], return_inverse=True)
    changes["mask_rows"] = used.copy()
    changes["mask_rows"][used >= 0] = numbers
    masks = choices.masks[kept] if kept.size else np.empty((0, 0), np.int32)
    return replace(choices, **changes, edit_start=start, masks=masks)


def _renumbered(wants: Wants, group: OwnRows) -> Wants:
    """Wants with the rows' numbers in a group."""
    order = np.argsort(group.rows)

    def place(rows: Array) -> Array:
        found: Array = order[np.searchsorted(group.rows, rows, sorter=order)].astype(rows.dtype)
        return found

    choices = replace(wants.choices, rows=place(wants.choices.rows))
    targets = replace(wants.targets, rows=place(wants.targets.rows))
    return _fitted(Wants(choices, targets, place(wants.whole)), group.values.shape[1])


def _fitted(wants: Wants, vocab_size: int) -> Wants:
    """Wants whose masks and counts are those of a vocabulary."""
    masks = np.ascontiguousarray(wants.choices.masks[:, : -(-vocab_size // 32)])
    top_k = np.minimum(wants.choices.top_k, vocab_size)
    return replace(wants, choices=replace(wants.choices, top_k=top_k, masks=masks))


def _whole(wants: Wants, parts: Sequence[tuple[_Part, Outcome]]) -> Array:
    """Whole rows in their order; narrower ones end in −∞. Those of one job have one width."""
    width = max((found.whole.shape[1] for part, found in parts if part.whole.size), default=0)
    whole = np.full((wants.whole.size, width), -np.inf, dtype=np.float32)
    for part, found in parts:
        if part.whole.size:
            whole[part.whole, : found.whole.shape[1]] = found.whole
    return whole
