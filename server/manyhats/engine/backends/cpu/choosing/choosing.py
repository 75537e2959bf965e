"""The ``choose`` kernel and the scratch memory it needs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu.choosing.sampling import choose
from manyhats.engine.backends.cpu.choosing.selection import GROUP, NUM_BUCKETS
from manyhats.engine.backends.wants import Array, Choices, Logits

_LARGEST = 1e30
"""Penalties stay within this magnitude, so that differences of logits remain finite in float32."""


class TokenChooser:
    """See ``Chooser.choose``. Serves one call at a time."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._scratch: tuple[np.ndarray, ...] = ()

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row of logits [M, V]."""
        num_rows, size = logits.shape
        tokens = torch.empty(num_rows, dtype=torch.int64)
        rows = logits.contiguous().numpy()
        choose(
            rows,
            choices.temperature,
            choices.top_k,
            choices.top_p,
            choices.min_p,
            choices.typical_p,
            choices.point,
            choices.edit_start,
            choices.edit_ids,
            edited(rows, choices),
            choices.mask_rows,
            _unpacked(choices.masks, size),
            *self._scratch_of(size),
            tokens.numpy(),
            min(self._num_threads, num_rows),
        )
        return tokens

    def _scratch_of(self, size: int) -> tuple[np.ndarray, ...]:
        """For each thread: ids, x, weights, scores and picks of a row, and buckets."""
        shape = (self._num_threads, -(-size // GROUP) * GROUP)
        if not self._scratch or self._scratch[0].shape != shape:
            kinds = (np.int32, np.float32, np.float32, np.float32, np.int32)
            rows = tuple(np.empty(shape, dtype=kind) for kind in kinds)
            self._scratch = (*rows, np.empty((self._num_threads, NUM_BUCKETS)))
        return self._scratch


def edited(logits: Logits, choices: Choices) -> Logits:
    """[E] float32: the logits of the edits' tokens, changed as ``Choices`` says.

    Args:
        logits: [S, V] float32, raw.
        choices: S rows.
    """
    row = np.repeat(np.arange(choices.num_rows), np.diff(choices.edit_start))
    values = logits[row, choices.edit_ids] + choices.edit_bias
    factor = choices.repetition_penalty[row]
    is_repeated = choices.edit_seen & (factor != 1.0)
    if is_repeated.any():
        with np.errstate(over="ignore"):
            wide = values.astype(np.float64)
            wide = np.clip(np.where(wide > 0, wide / factor, wide * factor), -_LARGEST, _LARGEST)
        values = np.where(is_repeated, wide.astype(np.float32), values)
    counts = choices.edit_counts
    penalty = choices.presence_penalty[row] * (counts > 0) + choices.frequency_penalty[row] * counts
    changed: Logits = values - penalty.astype(np.float32)
    return changed


def _unpacked(masks: Array, size: int) -> Array:
    """[K, V] bool."""
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=size if masks.size else 0, bitorder="little")
    return bits.view(np.bool_)
