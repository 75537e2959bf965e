"""Keys and values in the CPU's memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.packing import Array, as_array
from manyhats.engine.model.architecture import Architecture


class CpuKVCache:
    """Keys [blocks, Hkv, K, block_size] and values [blocks, Hkv, block_size, K], per layer.

    Zeroed, so that a position not yet written is finite.
    """

    def __init__(
        self, architecture: Architecture, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        heads, dim = architecture.attention.num_kv_heads, architecture.attention.head_dim
        shape_k = (architecture.num_layers, num_blocks, heads, dim, block_size)
        shape_v = (architecture.num_layers, num_blocks, heads, block_size, dim)
        # NumPy's zeros take no memory until they are written, torch's do.
        storage = np.uint16 if dtype == torch.bfloat16 else np.float32
        self._keys = np.zeros(shape_k, dtype=storage)
        self._values = np.zeros(shape_v, dtype=storage)
        self.dtype = dtype
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self._keys.nbytes + self._values.nbytes

    def describe(self, frame: Array) -> None:
        """Enters into a step's frame where keys and values lie."""
        num_kv_heads, head_dim, block_size = self._keys.shape[2:]
        frame[col.NUM_KV_HEADS] = num_kv_heads
        frame[col.HEAD_DIM] = head_dim
        frame[col.BLOCK_SIZE] = block_size
        frame[col.LAYER_BYTES] = self._keys[0].nbytes
        frame[col.KEYS] = self._keys.ctypes.data
        frame[col.VALUES] = self._values.ctypes.data

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies block source to block target in every layer."""
        for source, target in copies:
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes positions 0 … P − 1 of the blocks; keys and values [L, P, Hkv, K]."""
        block_size = self.block_size
        stored = [as_array(part.to(self.dtype)) for part in (keys, values)]
        for index, block in enumerate(blocks):
            part = slice(index * block_size, (index + 1) * block_size)
            count = stored[0][:, part].shape[1]
            self._keys[:, block, :, :, :count] = stored[0][:, part].transpose(0, 2, 3, 1)
            self._values[:, block, :, :count] = stored[1][:, part].transpose(0, 2, 1, 3)
