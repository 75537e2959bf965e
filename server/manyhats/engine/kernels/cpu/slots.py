"""Loaded adapters for the CPU kernels: one buffer each, and tables of where its matrices lie."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.engine.batch import AdapterRows
from manyhats.engine.errors import ModelError
from manyhats.engine.kernels.cpu.low_rank import low_rank
from manyhats.engine.kernels.cpu.packing import LANES, Array, as_array
from manyhats.engine.kernels.interface import FUSED
from manyhats.engine.model.config import DecoderConfig


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Of one fused linear of one layer: [S, parts] addresses, ranks and scales, and the parts' columns."""

    a_address: Array
    b_address: Array
    ranks: Array
    scales: Array
    columns: Array
    sizes: Array


class CpuAdapterSlots:
    """The loaded adapters, by slot; see ``AdapterSlots``."""

    def __init__(self, config: DecoderConfig, num_slots: int, dtype: torch.dtype, num_threads: int) -> None:
        sizes = out_features(config)
        self._tables = {
            (fused, layer): _new_table(num_slots, [sizes[name] for name in names])
            for fused, names in FUSED.items()
            for layer in range(config.num_layers)
        }
        self._places = {
            name: (fused, part) for fused, names in FUSED.items() for part, name in enumerate(names)
        }
        self._dtype = dtype
        self._like = as_array(torch.empty(1, dtype=dtype))
        self._buffers: dict[int, Tensor] = {}
        self._num_threads = num_threads
        self._scratch = np.empty((num_threads, 64), dtype=np.float32)
        self._lock = threading.Lock()

    def write(self, slot: int, adapter: LoweredAdapter) -> None:
        """Copies the adapter's matrices into one buffer and enters them into the tables."""
        for delta in adapter.deltas:
            if delta.a.shape[1] % LANES or delta.b.shape[0] % LANES:
                raise ModelError(
                    f"{delta.site}: the CPU kernels need dimensions that are multiples of {LANES}"
                )
        buffer = torch.empty(sum(d.a.numel() + d.b.numel() for d in adapter.deltas), dtype=self._dtype)
        start = 0
        for delta in adapter.deltas:
            start = self._enter(slot, delta, buffer, start)
        self._buffers[slot] = buffer
        largest = max((delta.rank for delta in adapter.deltas), default=0)
        with self._lock:  # several loaders write at a time; a smaller scratch must not replace a larger one
            if largest > self._scratch.shape[1]:
                self._scratch = np.empty((self._num_threads, largest), dtype=np.float32)

    def _enter(self, slot: int, delta: LowRank, buffer: Tensor, start: int) -> int:
        fused, part = self._places[delta.site.name]
        table = self._tables[fused, delta.site.layer]
        if table.ranks[slot, part]:
            raise ModelError(f"{delta.site}: one low-rank delta a site, not two")
        middle = start + delta.a.numel()
        end = middle + delta.b.numel()
        buffer[start:middle] = delta.a.reshape(-1)
        buffer[middle:end] = delta.b.t().reshape(-1)
        table.a_address[slot, part] = buffer[start:].data_ptr()
        table.b_address[slot, part] = buffer[middle:].data_ptr()
        table.scales[slot, part] = delta.scale
        table.ranks[slot, part] = delta.rank
        return end

    def clear(self, slot: int) -> None:
        """Frees a slot and its memory."""
        for table in self._tables.values():
            table.ranks[slot] = 0
        self._buffers.pop(slot, None)

    def num_bytes(self, slot: int) -> int:
        """Resident bytes of one slot's matrices."""
        buffer = self._buffers.get(slot)
        return 0 if buffer is None else buffer.numel() * buffer.element_size()

    def add_deltas(self, fused: str, layer: int, x: Tensor, y: Tensor, rows: AdapterRows) -> None:
        """Y += each row's delta, at every part of the fused linear."""
        table = self._tables[fused, layer]
        low_rank(
            x.numpy(),
            y.numpy(),
            rows.rows.numpy(),
            rows.slots.numpy(),
            table.a_address,
            table.b_address,
            table.ranks,
            table.scales,
            table.columns,
            table.sizes,
            self._like,
            self._scratch,
        )


def out_features(config: DecoderConfig) -> dict[str, int]:
    """Outputs of each linear of a layer."""
    keys = config.num_kv_heads * config.head_dim
    return {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": keys,
        "v_proj": keys,
        "o_proj": config.hidden_size,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "down_proj": config.hidden_size,
    }


def _new_table(num_slots: int, sizes: list[int]) -> _Table:
    shape = (num_slots, len(sizes))
    return _Table(
        a_address=np.zeros(shape, dtype=np.int64),
        b_address=np.zeros(shape, dtype=np.int64),
        ranks=np.zeros(shape, dtype=np.int32),
        scales=np.zeros(shape, dtype=np.float32),
        columns=np.array([sum(sizes[:part]) for part in range(len(sizes))], dtype=np.int32),
        sizes=np.array(sizes, dtype=np.int32),
    )
