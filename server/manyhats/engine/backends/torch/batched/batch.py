"""A step's plan on the device: what all layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.engine.backends.plan import Floats, Ints, StepPlan
from manyhats.engine.backends.torch.batched.rows import rows_by_slot
from manyhats.engine.backends.torch.upload import uploaded, uploaded_ints


class Batch:
    """The plan's numbers as int64 tensors, and the rows of each adapter.

    Attributes:
        plan: on the host.
        rows: of each slot but the base's.
        logit_rows_of: the same of the logit rows.
        num_virtual: of each sequence, how many cells are not of this step's rows.
    """

    def __init__(self, plan: StepPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        (
            self.token_ids,
            self.positions,
            self.cells,
            self.tables,
            self.logit_rows,
            self.hidden_rows,
            self.token_types,
        ) = uploaded_ints(
            [
                plan.token_ids,
                plan.positions,
                plan.cells,
                plan.block_tables,
                plan.logit_rows,
                plan.hidden_rows,
                plan.types_of_tokens,
            ],
            device,
        )
        self.rows = rows_by_slot(plan.row_slots, device)
        self.logit_rows_of = rows_by_slot(plan.row_slots[plan.logit_rows], device)

    @property
    def num_virtual(self) -> dict[int, int]:
        """By sequence."""
        counts = self.plan.query_start[1:] - self.plan.query_start[:-1]
        return dict(enumerate((self.plan.context_len - counts).tolist()))

    def put(self, x: Tensor, values: tuple[Ints, Floats] | None) -> None:
        """Write rows that are given as values."""
        if values is not None:
            (rows,) = uploaded_ints([values[0]], self.device)
            x.index_copy_(0, rows, uploaded(torch.from_numpy(values[1]), self.device).to(x.dtype))
