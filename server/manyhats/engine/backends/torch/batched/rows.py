"""Rows of a step that share an adapter: a slice where they lie together, so that nothing is gathered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.plan import Ints
from manyhats.engine.backends.torch.upload import uploaded_ints


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows, ascending.

    Attributes:
        host: [R] their indices.
        index: the same on the device: a slice, or int64.
    """

    host: Ints
    index: slice | Tensor

    def of(self, x: Tensor) -> Tensor:
        """Their values, [N, …] → [R, …]; a view if they lie together."""
        return x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write their values."""
        if isinstance(self.index, slice):
            x[self.index] = values
        else:
            x.index_copy_(0, self.index, values.to(x.dtype))

    def add(self, x: Tensor, values: Tensor) -> None:
        """Add to their values."""
        if isinstance(self.index, slice):
            x[self.index] += values
        else:
            x.index_add_(0, self.index, values.to(x.dtype))


def rows_by_slot(row_slots: Ints, device: torch.device) -> dict[int, Rows]:
    """The rows of each slot but the base's."""
    hosts = {slot: np.flatnonzero(row_slots == slot) for slot in np.unique(row_slots).tolist() if slot}
    apart = {slot: host for slot, host in hosts.items() if host[-1] - host[0] + 1 != host.size}
    indices = dict(zip(apart, uploaded_ints(list(apart.values()), device), strict=True))
    return {
        slot: Rows(host.astype(np.int32), indices.get(slot, slice(int(host[0]), int(host[-1]) + 1)))
        for slot, host in hosts.items()
    }
