"""Output heads as tasks' adapters have them."""

from __future__ import annotations

from torch import Tensor

from manyhats.adapters import equations
from manyhats.adapters.primitives import HeadRows, HeadWeight, LowRank
from manyhats.adapters.sites import HEAD
from manyhats.engine.backends.own_logits import resized
from manyhats.engine.backends.torch.batched.adapters import DeviceAdapter
from manyhats.engine.backends.torch.batched.linears import Dense


def changed_head(adapter: DeviceAdapter, hidden: Tensor, found: Tensor) -> Tensor | None:
    """The logits of rows of one adapter; None if it leaves the head as it is.

    Args:
        adapter: the rows'.
        hidden: [m, E], of the compute dtype.
        found: [m, V] float32, the base's.

    Returns:
        [m, tokens of the task] float32.
    """
    if HEAD not in adapter.deltas:
        return None
    found = found.clone() if adapter.vocab_size is None else resized(found, adapter.vocab_size)
    for own in adapter.at(HEAD, HeadWeight):
        found = Dense(own.weight, own.bias).wide(hidden)
    for replaced in adapter.at(HEAD, HeadRows):
        found.index_copy_(1, replaced.ids, Dense(replaced.rows, replaced.bias).wide(hidden))
    for low_rank in adapter.at(HEAD, LowRank):
        found += equations.low_rank(hidden, low_rank.a, low_rank.b, low_rank.scale)
    return found
