"""Keys and values in a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.triton import cache as kernels
from manyhats.engine.model.architecture import Architecture

_CHUNK = 2048


class CudaKVCache:
    """``KVCache`` of bfloat16: keys and values [L, num_blocks + 1, block_size, Hkv, K].

    The last block is spare: rows that only fill up a step write there. All are zeroed, so that a position not yet
    written is finite.

    Args:
        architecture: the model's.
        num_blocks: available to sequences.
        block_size: cells per block.
        device: where.
    """

    def __init__(
        self, architecture: Architecture, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        attention = architecture.attention
        shape = (
            architecture.num_layers,
            num_blocks + 1,
            block_size,
            attention.num_kv_heads,
            attention.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.zeros_like(self.keys)
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        """Resident bytes, the spare block's among them."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def spare_block(self) -> int:
        """The block that no sequence has."""
        return self.num_blocks

    def copy_blocks(self, copies: Tensor, count: Tensor, num_programs: int) -> None:
        """Launches copies in every layer.

        Args:
            copies: [C, 2] int32 on the device, source and target block; no target is another one's source.
            count: [1] int32 on the device, how many these are.
            num_programs: that share the copies, for each layer.
        """
        kernels.copy_blocks[(num_programs, self.keys.shape[0])](
            self.keys,
            self.values,
            copies,
            count,
            self.keys.stride(0),
            SIZE=self.keys.stride(1),
            CHUNK=_CHUNK,
            num_warps=4,
            enable_fp_fusion=False,
        )

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Rounds keys and values [L, P, Hkv, K] into cells 0 … P − 1 of the blocks."""
        cells = self._cells_of(blocks, keys.shape[1])
        for given, stored in ((keys, self.keys), (values, self.values)):
            rounded = self._sent(given.to(stored.dtype))
            stored.flatten(1, 2).index_copy_(1, cells, rounded)

    def _cells_of(self, blocks: Sequence[int], count: int) -> Tensor:
        """The first ``count`` cells of blocks in order: int64 on the cache's device."""
        index = torch.arange(count)
        cells = torch.tensor(blocks)[index // self.block_size] * self.block_size + index % self.block_size
        return self._sent(cells)

    def _sent(self, values: Tensor) -> Tensor:
        """From the host, which waits for nothing if the memory is pinned."""
        device = self.keys.device
        return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
