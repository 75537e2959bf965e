"""Keys and values in blocks, and attention over them by the engine's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.attention.attend import Parts, WorkOnDevice, attend
from manyhats.engine.backends.cuda.attention.work import Tiling, work_of
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.model.architecture import Attention

BLOCK = 16
Chunk = tuple[int, int, int]
"""Of a text, the rows from one position to before another."""


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Sequences of random keys and values, and of queries at their last positions.

    Attributes:
        queries: [length or less, H, K] bfloat16, of each text.
        keys: [blocks, BLOCK, Hkv, K] bfloat16. values: the same.
        tables: blocks of each text.
        lengths: of the texts.
    """

    attention: Attention
    queries: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    tables: tuple[range, ...]
    lengths: tuple[int, ...]

    @classmethod
    def make(
        cls, attention: Attention, lengths: Sequence[int], num_queries: int, device: torch.device
    ) -> Texts:
        """Of so many positions, each with queries at so many."""
        generator = torch.Generator(device).manual_seed(len(lengths))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        counts = [-(-length // BLOCK) for length in lengths]
        ends = list(accumulate(counts))
        cells = (ends[-1], BLOCK, attention.num_kv_heads, attention.head_dim)
        heads = (attention.num_heads, attention.head_dim)
        return cls(
            attention,
            tuple(random(min(length, num_queries), *heads) for length in lengths),
            random(*cells),
            random(*cells),
            tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True)),
            tuple(lengths),
        )

    def rows(self, chunk: Chunk) -> Tensor:
        """A chunk's queries."""
        text, first, end = chunk
        ahead = self.lengths[text] - len(self.queries[text])
        return self.queries[text][first - ahead : end - ahead]

    def context(self, text: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values before a position, [end, Hkv, K]."""
        table = self.tables[text]
        keys, values = (
            part[table.start : table.stop].flatten(0, 1)[:end] for part in (self.keys, self.values)
        )
        return keys, values


class AttentionStep:
    """Attention of some chunks, ready to be launched; what it writes holds NaN before.

    Args:
        texts: what is read.
        chunks: of them.
        num_lanes: programs that walk the work.
        max_slots: parts of contexts that are apart; 0 has one program walk each context.

    Attributes:
        out: [N, H, K] bfloat16.
    """

    def __init__(self, texts: Texts, chunks: Sequence[Chunk], num_lanes: int, max_slots: int = 2048) -> None:
        attention, device = texts.attention, texts.keys.device
        plan = _plan(texts, chunks)
        self._texts, self._tiling, self._num_lanes = texts, Tiling.of(attention), num_lanes
        work = work_of(plan, attention, self._tiling, num_lanes, max_slots)

        def there(values: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
            return torch.from_numpy(values).to(device)

        def poisoned(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=device)

        counts = [there(int32([len(part)])) for part in (work.items, work.merges)]
        self._work = WorkOnDevice(there(work.items), counts[0], there(work.merges), counts[1])
        self._tables = there(plan.block_tables)
        heads, size = attention.num_heads, attention.head_dim
        self._parts = Parts(poisoned(work.num_slots, heads, size), poisoned(work.num_slots, heads, 2))
        self._queries = torch.cat([texts.rows(chunk) for chunk in chunks])
        self.out = poisoned(plan.num_rows, heads, size).bfloat16()

    def launch(self) -> None:
        """Launch it."""
        texts = self._texts
        attend(
            self._queries,
            texts.keys,
            texts.values,
            self._tables,
            self._work,
            self._parts,
            self.out,
            texts.attention,
            self._tiling,
            self._num_lanes,
        )

    def run(self) -> Tensor:
        """Launch it, and what it wrote."""
        self.launch()
        return self.out


def num_lanes_of(attention: Attention, device: torch.device) -> int:
    """As the engine has it: two programs for each processor."""
    processors = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, 2 * processors // Tiling.of(attention).head_tiles)


def _plan(texts: Texts, chunks: Sequence[Chunk]) -> StepPlan:
    starts = int32([0, *accumulate(end - first for _, first, end in chunks)])
    tables = np.zeros((len(chunks), max(len(texts.tables[text]) for text, _, _ in chunks)), np.int32)
    for row, (text, _, _) in enumerate(chunks):
        tables[row, : len(texts.tables[text])] = texts.tables[text]
    num_rows = int(starts[-1])
    return StepPlan(
        token_ids=np.zeros(num_rows, np.int32),
        positions=np.zeros(num_rows, np.int32),
        cells=np.zeros(num_rows, np.int64),
        query_start=starts,
        context_len=int32([end for _, _, end in chunks]),
        block_tables=tables,
        row_slots=np.zeros(num_rows, np.int32),
        logit_rows=int32([]),
    )
