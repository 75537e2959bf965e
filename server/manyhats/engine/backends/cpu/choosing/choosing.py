"""The ``choose`` kernel and the scratch memory it needs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.choices import Choices
from manyhats.engine.backends.cpu.choosing.sampling import choose
from manyhats.engine.backends.cpu.choosing.selection import GROUP, NUM_BUCKETS


class TokenChooser:
    """See ``Kernels.choose``. Serves one call at a time."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._scratch: tuple[np.ndarray, ...] = ()

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row of logits [M, V]."""
        num_rows, size = logits.shape
        tokens = torch.empty(num_rows, dtype=torch.int64)
        choose(
            logits.contiguous().numpy(),
            choices.temperature.numpy(),
            choices.top_k.numpy(),
            choices.top_p.numpy(),
            choices.min_p.numpy(),
            choices.typical_p.numpy(),
            choices.point.numpy(),
            choices.edit_start.numpy(),
            choices.edit_ids.numpy(),
            choices.edit_values.numpy(),
            choices.mask_rows.numpy(),
            choices.masks.numpy(),
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
