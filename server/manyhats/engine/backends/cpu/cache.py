"""Keys and values in the CPU's memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.packing import Array, as_array
from manyhats.engine.backends.int8 import quantized
from manyhats.engine.model.architecture import Architecture


class CpuKVCache:
    """Keys [Hkv, blocks, K, block_size] and values [Hkv, blocks, block_size, K], per layer.

    A thread reads one head's keys or values at a time: those of neighbouring blocks are one piece of memory.
    As int8, each head of each cell has a scale, of its keys and of its values: [Hkv, blocks, block_size] float32. All
    are zeroed, so that a position not yet written is finite.
    """

    def __init__(
        self, architecture: Architecture, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        heads, dim = architecture.attention.num_kv_heads, architecture.attention.head_dim
        shape_k = (architecture.num_layers, heads, num_blocks, dim, block_size)
        shape_v = (architecture.num_layers, heads, num_blocks, block_size, dim)
        # NumPy's zeros take no memory until they are written, torch's do.
        storage = {torch.bfloat16: np.uint16, torch.int8: np.int8}.get(dtype, np.float32)
        self._keys = np.zeros(shape_k, dtype=storage)
        self._values = np.zeros(shape_v, dtype=storage)
        shape = (architecture.num_layers, heads, num_blocks if dtype == torch.int8 else 0, block_size)
        self._scales = np.zeros((2, *shape), dtype=np.float32)
        self.dtype = dtype
        self.num_blocks = num_blocks
        self.block_size = block_size
        columns = self._columns()
        self._described = np.array(list(columns)), np.array(list(columns.values()), dtype=np.int64)

    def _columns(self) -> dict[int, int]:
        """What every frame says of it."""
        num_kv_heads, num_blocks, head_dim, block_size = self._keys.shape[1:]
        return {
            col.NUM_KV_HEADS: num_kv_heads,
            col.HEAD_DIM: head_dim,
            col.BLOCK_SIZE: block_size,
            col.NUM_BLOCKS: num_blocks,
            col.LAYER_BYTES: self._keys[0].nbytes,
            col.KEYS: self._keys.ctypes.data,
            col.VALUES: self._values.ctypes.data,
            col.LAYER_SCALES: self._scales[0, 0].size,
            col.KEY_SCALES: self._scales[0].ctypes.data,
            col.VALUE_SCALES: self._scales[1].ctypes.data,
        }

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self._keys.nbytes + self._values.nbytes + self._scales.nbytes

    def describe(self, frame: Array) -> None:
        """Enters into a step's frame where keys and values lie."""
        columns, values = self._described
        frame[columns] = values

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies block source to block target in every layer."""
        for source, target in copies:
            self._keys[:, :, target] = self._keys[:, :, source]
            self._values[:, :, target] = self._values[:, :, source]
            if self.dtype == torch.int8:
                self._scales[:, :, :, target] = self._scales[:, :, :, source]

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes positions 0 … P − 1 of the blocks; keys and values [L, P, Hkv, K]."""
        if self.dtype == torch.int8:
            (keys, key_scales), (values, value_scales) = quantized(keys.float()), quantized(values.float())
            self._write_scales(blocks, key_scales.numpy(), value_scales.numpy())
        block_size = self.block_size
        stored = [as_array(part.to(self.dtype)) for part in (keys, values)]
        for index, block in enumerate(blocks):
            part = slice(index * block_size, (index + 1) * block_size)
            count = stored[0][:, part].shape[1]
            self._keys[:, :, block, :, :count] = stored[0][:, part].transpose(0, 2, 3, 1)
            self._values[:, :, block, :count] = stored[1][:, part].transpose(0, 2, 1, 3)

    def _write_scales(self, blocks: Sequence[int], keys: Array, values: Array) -> None:
        """Writes those of positions 0 … P − 1 of the blocks; of keys and values [L, P, Hkv]."""
        for index, block in enumerate(blocks):
            part = slice(index * self.block_size, (index + 1) * self.block_size)
            for kind, scales in enumerate((keys, values)):
                own = scales[:, part].transpose(0, 2, 1)
                self._scales[kind, :, :, block, : own.shape[2]] = own
