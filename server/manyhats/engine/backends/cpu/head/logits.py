"""A step's logits on the CPU, of which those that matter are exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.head.exact import NUM_CANDIDATES
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import LANES, CpuLinear
from manyhats.engine.backends.cpu.program import Program
from manyhats.engine.backends.logits import Finished, HostLogits
from manyhats.engine.backends.own_logits import OwnRows, finish_apart
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.backends.wants import Array, Choices, Targets, TokenLogprob, Wants
from manyhats.engine.model import architecture

_HARMLESS = 1e20
"""Smaller inputs than this, times weights that ``takes_int8`` lets pass, do not add up to infinity."""
_MANY_TOP = NUM_CANDIDATES // 2
"""As many of a row's likeliest tokens are among its candidates for certain, whatever the errors."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedHead:
    """An output head.

    Attributes:
        own: its weights.
        fast: the same in eight bits, for logits that are nearly right; None to compute all from ``own``.
        shape: what follows the product.
    """

    own: CpuLinear
    fast: CpuLinear | None
    shape: architecture.Head

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.own.num_bytes + (self.fast.num_bytes if self.fast else 0)


class CpuLogits(HostLogits):
    """Logits of a forward; where the head has fast weights, ``Program.refine`` made each row's likeliest tokens exact.

    Here become exact, too: tokens whose log-probabilities are wanted, those that a request edits, the likeliest of the
    others that it allows, and rows that are wanted whole or with very many of their likeliest tokens, whose adapter
    changes the head, or whose inputs are huge or not finite. What stays nearly right are the logits of tokens that are
    far from likely, where they share in a sum or a rank.

    Args:
        head: what computed the logits.
        hidden: the head's inputs, [M, E].
        values: the product's outputs, [M, V], which are changed.
        kernels: to compute with.
        wanted: hidden values to return, [H, E]; None for none.

    Attributes:
        head, hidden: the same.
    """

    def __init__(
        self,
        head: PackedHead,
        hidden: Tensor,
        values: Tensor,
        kernels: CpuKernels,
        wanted: Tensor | None = None,
    ) -> None:
        super().__init__(values, kernels, wanted)
        self.head = head
        self.hidden = hidden
        self._kernels = kernels
        self._exact_rows = np.empty(0, dtype=np.int64)
        self._own: list[OwnRows] = []

    def change(self, adapters: CpuAdapterSlots, rows: AdapterRows) -> None:
        """Gives rows the output heads of their adapters."""
        self._make_rows_exact(adapters.rows_with_heads(rows))
        self._own = adapters.change_logits(self.hidden, self.values, rows)

    def finish(self, wants: Wants) -> Finished:
        """Compute everything at once; rows with a vocabulary of their own by themselves."""
        if not self._own:
            return self._finish_base(wants)
        for own in self._own:
            self._finish_head(own.values)
        outcome = finish_apart(
            self._own,
            self.values.shape[1],
            self._kernels,
            wants,
            lambda rest: self._finish_base(rest).outcome,
        )
        return Finished(outcome)

    def _finish_base(self, wants: Wants) -> Finished:
        choices = wants.choices
        self._make_rows_exact(self._rows_in_doubt())
        self._make_rows_exact(wants.whole)
        self._make_rows_exact(wants.targets.rows[wants.targets.num_top > _MANY_TOP])
        self._make_rows_exact(choices.rows[choices.num_logprobs > _MANY_TOP])
        if choices.edit_ids.size or choices.masks.size:
            self._refine_allowed(choices)
        self._finish_head(self.values)
        if choices.edit_ids.size:
            self._make_exact(np.repeat(choices.rows, np.diff(choices.edit_start)), choices.edit_ids)
        return self._finish(wants)

    def _non_finite_rows(self) -> list[int]:
        if self.head.fast is not None and not self._exact_rows.size:
            return []
        return super()._non_finite_rows()

    def _rows_in_doubt(self) -> Array:
        """The rows whose inputs do not promise finite logits; to look at inputs takes far less than at logits."""
        if self.head.fast is None:
            return np.empty(0, dtype=np.int64)
        sizes = np.abs(self.hidden.numpy())
        if not sizes.size or sizes.max() < _HARMLESS:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(~(sizes.max(axis=1) < _HARMLESS))

    def _found(self, targets: Targets) -> list[TokenLogprob]:
        found = super()._found(targets)
        if self.head.fast is None:
            return found
        places = np.flatnonzero(~self._is_exact(targets.rows))
        if not places.size:
            return found
        rows, ids = targets.rows[places], targets.ids[places]
        # The logits stay as they are: in the sum, they would change what is found for a row's other tokens.
        missing = self._exact(rows, ids).astype(np.float64) - self.values.numpy()[rows, ids]
        for place, difference in zip(places.tolist(), missing.tolist(), strict=True):
            if difference:
                found[place] = replace(found[place], logprob=found[place].logprob + difference)
        return found

    def _finish_head(self, logits: Tensor) -> None:
        """Carries out what follows the product, in place."""
        shape = self.head.shape
        if shape.divisor != 1.0:
            logits.div_(shape.divisor)
        if shape.softcap is None:
            return
        missing = -logits.shape[1] % LANES
        if logits is self.values or not missing:
            self._kernels.softcap(logits, shape.softcap)
        else:  # whole vectors, so that what a logit becomes does not depend on its place
            padded = torch.nn.functional.pad(logits, (0, missing))
            self._kernels.softcap(padded, shape.softcap)
            logits.copy_(padded[:, : logits.shape[1]])

    def _make_rows_exact(self, rows: Array) -> None:
        """Makes all logits of some rows exact."""
        if self.head.fast is None or not rows.size:
            return
        rows = np.unique(rows[~self._is_exact(rows)])
        if rows.size:
            at = torch.from_numpy(rows).long()
            self.values[at] = self._kernels.linear(self.hidden[at], self.head.own)
            self._exact_rows = np.concatenate((self._exact_rows, rows))

    def _refine_allowed(self, choices: Choices) -> None:
        """Makes the likeliest exact among the tokens that may come and are not edited, in rows that say which."""
        if self.head.fast is None:
            return
        num_edits = np.diff(choices.edit_start)
        places = np.flatnonzero(((num_edits > 0) | (choices.mask_rows >= 0)) & ~self._is_exact(choices.rows))
        if not places.size:
            return
        num_words = -(-self.values.shape[1] // 32)
        allowed = np.full((places.size, 1 + num_words), -1, dtype=np.int32)
        for index, place in enumerate(places):
            allowed[index, 0] = choices.rows[place]
            mask = allowed[index, 1:]
            if choices.mask_rows[place] >= 0:
                mask[:] = choices.masks[choices.mask_rows[place]]
            edits = choices.edit_ids[choices.edit_start[place] : choices.edit_start[place + 1]]
            np.bitwise_and.at(
                mask, edits // 32, ~(np.uint32(1) << (edits % 32).astype(np.uint32)).view(np.int32)
            )
        program = Program()
        program.refine_allowed(0, 1, 2, self.head.own)
        self._kernels.run_alone(program, [torch.from_numpy(allowed), self.hidden, self.values])

    def _make_exact(self, rows: Array, ids: Array) -> None:
        """Makes the logits of some tokens exact; the ids are in the vocabulary."""
        is_open = ~self._is_exact(rows)
        if self.head.fast is not None and is_open.any():
            rows, ids = rows[is_open], ids[is_open]
            self.values.numpy()[rows, ids] = self._exact(rows, ids)

    def _exact(self, rows: Array, ids: Array) -> Array:
        """The exact logits of some tokens, with what follows the product; there is at least one."""
        # The kernels cap rows of whole vectors.
        found = torch.zeros(1, -(-len(ids) // LANES) * LANES)
        program = Program()
        program.exact_logits(0, 1, 2, self.head.own)
        pairs = torch.from_numpy(np.stack((rows.astype(np.int64), ids.astype(np.int64)), axis=1))
        self._kernels.run_alone(program, [pairs, self.hidden, found])
        self._finish_head(found)
        return found.numpy()[0, : len(ids)]

    def _is_exact(self, rows: Array) -> Array:
        """Which of some rows are exact as a whole."""
        return np.isin(rows, self._exact_rows)
