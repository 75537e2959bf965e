"""A decoder without a model, so that tests of the engine's loop take milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.plan import AdapterRows, StepPlan
from support.oracles.operations import ReferenceKernels


class KeptSlot:
    """A ``Placement`` of sequences that all run on one slot, at any time."""

    def __init__(self, slot: int) -> None:
        self._slot = slot

    def can_place(self) -> bool:
        return True

    def place(self) -> int:
        return self._slot

    def leave(self) -> None: ...


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

    Attributes:
        memory: if set, what comes next mostly depends on this many last tokens, so that answers repeat themselves.
    """

    def __init__(self, vocab_size: int, poison: Iterable[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.poison = tuple(poison)
        self.before_forward: Callable[[StepPlan], None] = lambda plan: None
        self.num_forwards = 0
        self.memory: int | None = None

    def forward(self, plan: StepPlan, cache: FakeCache, adapters: object) -> HostLogits:
        self.before_forward(plan)
        self.num_forwards += 1
        cache.copy_blocks(plan.block_copies)
        tokens = plan.token_ids.astype(np.int64)
        adapter_rows = AdapterRows.of(plan.row_slots)
        tokens[adapter_rows.rows] += self.vocab_size * adapter_rows.slots
        cache.entries[plan.cells] = tokens
        starts = plan.query_start.tolist()
        rows: list[Tensor] = []
        for row in plan.logit_rows.tolist():
            sequence = int(np.searchsorted(starts, row, side="right")) - 1
            end = int(plan.context_len[sequence]) - (starts[sequence + 1] - row) + 1
            positions = np.arange(end)
            blocks = plan.block_tables[sequence][positions // cache.block_size]
            rows.append(self.logits(cache.entries[blocks * cache.block_size + positions % cache.block_size]))
        logits = torch.stack(rows) if rows else torch.empty(0, self.vocab_size)
        return HostLogits(logits, ReferenceKernels())

    def logits(self, history: np.ndarray) -> Tensor:
        """[V] after a history of tokens, each plus V times its adapter slot."""
        if np.isin(history % self.vocab_size, self.poison).any():
            return torch.full((self.vocab_size,), torch.nan)
        values = self._hashed(history)
        if self.memory is not None:
            values = 3 * self._hashed(history[-self.memory :] % 16) + 0.1 * values
        return torch.from_numpy(values.astype(np.float32))

    def _hashed(self, history: np.ndarray) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(history.tobytes(), digest_size=8).digest(), "little")
        return np.random.default_rng(seed).normal(size=self.vocab_size)

    def greedy(self, prompt: Iterable[int], num_tokens: int, slot: int = 0) -> list[int]:
        """What it says after a prompt, greedily."""
        history = np.array(list(prompt), dtype=np.int64) + self.vocab_size * slot
        out: list[int] = []
        for _ in range(num_tokens):
            out.append(int(self.logits(history).argmax()))
            history = np.append(history, out[-1] + self.vocab_size * slot)
        return out
