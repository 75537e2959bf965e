"""A forward's logits on their device, and what is computed from them there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.own_logits import OwnRows, PendingParts, Vocabularies
from manyhats.engine.backends.torch.batched.choosing import chosen
from manyhats.engine.backends.torch.batched.logprobs import logprobs_of
from manyhats.engine.backends.torch.upload import uploaded_ints
from manyhats.engine.backends.wants import Outcome, Token, TokenLogprob, Wants


class DeviceLogits:
    """``Logits`` on a device.

    Args:
        values: [M, V] float32.
        hidden: [H, E] float32, to be returned.
        own: rows of tasks with a vocabulary of their own, whose ``values`` are on the device.
    """

    def __init__(self, values: Tensor, hidden: Tensor, own: Sequence[OwnRows] = ()) -> None:
        self._values = values
        self._hidden = hidden
        self._own = own

    @torch.inference_mode()
    def finish(self, wants: Wants) -> PendingOutcome | PendingParts:
        """Launch what is wanted, and the copies of it to the host."""
        if not self._own:
            return _launched(self._values, self._hidden, wants)
        vocabularies = Vocabularies.of(self._own, self._values.shape[1], wants)
        pending = [
            _launched(self._values if group is None else group.values, self._hidden, part)
            for group, part in vocabularies.wants
        ]
        return PendingParts(vocabularies, pending)


@dataclass(frozen=True, slots=True, eq=False)
class PendingOutcome:
    """What was launched: tensors of the host that a device still writes, until ``written``.

    Attributes:
        wants: that it answers.
        asking: which choices want log-probabilities.
        tokens: [S]; of the ``logprobs`` the choices' come first, then the targets'.
        is_bad: [M].
        whole: [W, V].
        hidden: [H, E].
        logprobs: see ``logprobs_of``; None if none are wanted.
        written: None where there is no device to wait for.
    """

    wants: Wants
    asking: np.ndarray
    tokens: Tensor
    is_bad: Tensor
    whole: Tensor
    hidden: Tensor
    logprobs: tuple[Tensor, ...] | None
    written: torch.cuda.Event | None

    def result(self) -> Outcome:
        """Wait, and read."""
        if self.written is not None:
            self.written.synchronize()
        tokens = self.tokens.tolist()
        found = self._logprobs()
        own = dict(zip(self.asking.tolist(), found, strict=False))
        return Outcome(
            tokens=[
                Token(token, own.get(index) if token >= 0 else None) for index, token in enumerate(tokens)
            ],
            targets=found[len(self.asking) :],
            whole=self.whole.numpy().copy(),
            bad_rows=frozenset(np.flatnonzero(self.is_bad.numpy()).tolist()),
            hidden=self.hidden.numpy().copy(),
        )

    def _logprobs(self) -> list[TokenLogprob]:
        if self.logprobs is None:
            return []
        values, ranks, top_ids, top = (part.numpy() for part in self.logprobs)
        counts = np.concatenate((self.wants.choices.num_logprobs[self.asking], self.wants.targets.num_top))
        return [
            TokenLogprob(value, rank, array("q", ids[:count].tobytes()), array("d", own[:count].tobytes()))
            for value, rank, ids, own, count in zip(
                values.tolist(), ranks.tolist(), top_ids, top, counts.tolist(), strict=True
            )
        ]


def _launched(values: Tensor, hidden: Tensor, wants: Wants) -> PendingOutcome:
    choices, targets = wants.choices, wants.targets
    device = values.device
    tokens = chosen(values, choices) if choices.num_rows else torch.empty(0, dtype=torch.int64)
    asking = np.flatnonzero(choices.num_logprobs >= 0)
    logprobs = None
    if asking.size or targets.ids.size:
        places, rows, ids, whole = uploaded_ints(
            [asking, np.concatenate((choices.rows[asking], targets.rows)), targets.ids, wants.whole], device
        )
        if asking.size:
            ids = torch.cat((tokens.index_select(0, places).clamp(min=0), ids))
        most = max([*choices.num_logprobs[asking].tolist(), *targets.num_top.tolist()])
        logprobs = tuple(
            _fetched(part) for part in logprobs_of(values, rows, ids, min(most, values.shape[1]))
        )
    else:
        (whole,) = uploaded_ints([wants.whole], device)
    found = PendingOutcome(
        wants=wants,
        asking=asking,
        tokens=_fetched(tokens),
        is_bad=_fetched(~torch.isfinite(values).all(dim=1)),
        whole=_fetched(values.index_select(0, whole)),
        hidden=_fetched(hidden),
        logprobs=logprobs,
        written=torch.cuda.Event() if device.type == "cuda" else None,
    )
    if found.written is not None:
        found.written.record()
    return found


def _fetched(values: Tensor) -> Tensor:
    """A tensor of the host, pinned, that is written once the device gets there."""
    return values.to("cpu", non_blocking=True)
