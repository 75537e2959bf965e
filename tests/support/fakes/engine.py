"""A decoder without a model, so that tests of the engine's loop take milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.backends.batch import Batch


class FakeCache:
    """Keeps, for every KV slot, the token that was written there and its adapter."""

    num_bytes = 0

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.entries = np.full(num_blocks * block_size, -1, dtype=np.int64)

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        blocks = self.entries.reshape(-1, self.block_size)
        for source, target in copies:
            blocks[target] = blocks[source]


class FakeDecoder:
    """Logits are a hash of all the tokens that the cache holds for a row, so a wrong block changes them.

    Args:
        vocab_size: V.
        poison: token ids that turn the logits of every later row of their sequence to NaN.
    """

    def __init__(self, vocab_size: int, poison: Iterable[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.poison = tuple(poison)
        self.before_forward: Callable[[Batch], None] = lambda batch: None
        self.num_forwards = 0

    def forward(self, batch: Batch, cache: FakeCache, adapters: AdapterSlots) -> Tensor:
        self.before_forward(batch)
        self.num_forwards += 1
        cache.copy_blocks(batch.block_copies)
        tokens = batch.token_ids.numpy().copy()
        tokens[batch.adapter_rows.rows.numpy()] += self.vocab_size * batch.adapter_rows.slots.numpy()
        cache.entries[batch.slot_mapping.numpy()] = tokens
        starts = batch.query_start.tolist()
        rows: list[Tensor] = []
        for row in batch.logit_rows.tolist():
            sequence = int(np.searchsorted(starts, row, side="right")) - 1
            end = int(batch.context_len[sequence]) - (starts[sequence + 1] - row) + 1
            positions = np.arange(end)
            blocks = batch.block_tables[sequence].numpy()[positions // cache.block_size]
            rows.append(self.logits(cache.entries[blocks * cache.block_size + positions % cache.block_size]))
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def logits(self, history: np.ndarray) -> Tensor:
        """[V] after a history of tokens, each plus V times its adapter slot."""
        if np.isin(history % self.vocab_size, self.poison).any():
            return torch.full((self.vocab_size,), torch.nan)
        seed = int.from_bytes(hashlib.blake2b(history.tobytes(), digest_size=8).digest(), "little")
        return torch.from_numpy(np.random.default_rng(seed).normal(size=self.vocab_size).astype(np.float32))

    def greedy(self, prompt: Iterable[int], num_tokens: int, slot: int = 0) -> list[int]:
        """What it says after a prompt, greedily."""
        history = np.array(list(prompt), dtype=np.int64) + self.vocab_size * slot
        out: list[int] = []
        for _ in range(num_tokens):
            out.append(int(self.logits(history).argmax()))
            history = np.append(history, out[-1] + self.vocab_size * slot)
        return out
