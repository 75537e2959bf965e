"""From a layer's queries, keys and values to its attention, through the cache, as the torch backend goes there."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.attention.attend import Parts, WorkOnDevice, attend
from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
from manyhats.engine.backends.cuda.attention.rotary import rotate_and_store
from manyhats.engine.backends.cuda.attention.work import Tiling, work_of
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.model import attended, rotated
from manyhats.engine.model.rotary import RotaryTables
from support.factories.architectures import make_architecture, make_attention

HEADS, KV_HEADS, SIZE, BLOCK, NUM_BLOCKS, LAYER, PREFIX = 2, 1, 16, 4, 6, 1, 6
ATTENTION = make_attention(HEADS, KV_HEADS, SIZE, scale=0.25, rotary_dim=8)
ARCHITECTURE = make_architecture(ATTENTION, num_layers=2)
TABLE = RotaryTables(ARCHITECTURE).tables[ATTENTION.rope]
PLAN = StepPlan(
    token_ids=np.zeros(5, np.int32),
    positions=int32([0, 1, 2, 0, 1]),
    cells=np.array([6, 7, 16, 12, 13]),
    query_start=int32([0, 3, 5]),
    context_len=int32([PREFIX + 3, 2]),
    block_tables=int32([[2, 1, 4], [3, 0, 0]]),
    row_slots=np.zeros(5, np.int32),
    logit_rows=int32([]),
)
"""A text behind a prefix of six positions, which end within its second block, and a text without one."""


def on_device(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(DEVICE)


def by_kernels(qkv: Tensor, cache: CudaKVCache) -> Tensor:
    queries = torch.full((5, HEADS, SIZE), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    keys, values = cache.keys[LAYER], cache.values[LAYER]
    table = (TABLE[0].to(DEVICE), TABLE[1].to(DEVICE))
    rows = on_device(PLAN.positions), on_device(PLAN.cells)
    rotate_and_store(qkv, ATTENTION, table, *rows, None, None, queries, keys, values)
    tiling = Tiling.of(ATTENTION)
    work = work_of(PLAN, ATTENTION, tiling, num_lanes=2, max_slots=0)
    counts = [on_device(int32([len(part)])) for part in (work.items, work.merges)]
    there = WorkOnDevice(on_device(work.items), counts[0], on_device(work.merges), counts[1])
    parts = Parts(torch.empty(0, HEADS, SIZE, device=DEVICE), torch.empty(0, HEADS, 2, device=DEVICE))
    out = torch.full((5, HEADS, SIZE), torch.nan, device=DEVICE)
    tables = on_device(PLAN.block_tables)
    attend(queries, keys, values, tables, there, parts, out, ATTENTION, tiling, num_lanes=2)
    return out.cpu()


def by_torch(qkv: Tensor, cache: TorchKVCache) -> Tensor:
    """In float64 but for what is stored, queries among it."""
    queries, keys, values = (
        part.unflatten(1, (-1, SIZE))
        for part in qkv.split((HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE), 1)
    )
    angles = (TABLE[0][PLAN.positions], TABLE[1][PLAN.positions])
    cache.store(LAYER, torch.from_numpy(PLAN.cells), rotated(keys, angles), values)
    queries = rotated(queries, angles).bfloat16().double()
    rows = []
    for text, (first, end) in enumerate(pairwise(PLAN.query_start.tolist())):
        length = int(PLAN.context_len[text])
        cells = cache.cells_of(torch.from_numpy(PLAN.block_tables[text]), length)
        for row in range(first, end):
            seen = ATTENTION.seen(length - (end - row), length)
            read = (part.double() for part in cache.read(LAYER, cells[seen.start : seen.stop]))
            rows.append(attended(queries[row], *read, ATTENTION))
    return torch.stack(rows)


def test_rows_see_their_texts_prefix_and_what_the_step_stored() -> None:
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * SIZE)
    prefix = torch.randn(2, 2, PREFIX, KV_HEADS, SIZE)
    cache = CudaKVCache(ARCHITECTURE, NUM_BLOCKS, BLOCK, torch.device(DEVICE))
    oracle = TorchKVCache(ARCHITECTURE, NUM_BLOCKS, BLOCK, torch.bfloat16, torch.device("cpu"))
    for each in (cache, oracle):
        each.write([2, 1], *prefix)
    found, wanted = by_kernels(qkv.to(DEVICE), cache), by_torch(qkv, oracle)
    assert (found.double() - wanted).norm() <= 2e-3 * wanted.norm()
    for stored, of_torch in ((cache.keys, oracle.keys), (cache.values, oracle.values)):
        assert torch.equal(stored[:, :-1].flatten(1, 2).cpu(), of_torch)
