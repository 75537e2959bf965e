"""Keys and values in a device's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.model.architecture import Architecture


class TorchKVCache:
    """Keys and values as [L, num_blocks · block_size, Hkv, K]."""

    def __init__(
        self,
        architecture: Architecture,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        attention = architecture.attention
        shape = (
            architecture.num_layers,
            num_blocks * block_size,
            attention.num_kv_heads,
            attention.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.keys.nbytes + self.values.nbytes

    def copy_blocks(self, plan: StepPlan) -> None:
        """Copies the blocks that a step wants copied, in every layer."""
        size = self.block_size
        for source, target in plan.block_copies:
            for part in (self.keys, self.values):
                part[:, target * size : (target + 1) * size] = part[:, source * size : (source + 1) * size]

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes cells 0 … P − 1 of the blocks; keys and values [L, P, Hkv, K]."""
        cells = self.cells_of(torch.tensor(blocks), keys.shape[1])
        self.keys[:, cells] = keys.to(self.keys)
        self.values[:, cells] = values.to(self.values)

    def cells_of(self, blocks: Tensor, count: int) -> Tensor:
        """The first ``count`` cells of blocks in order: int64 on the cache's device."""
        index = torch.arange(count)
        cells = blocks.long()[index // self.block_size] * self.block_size + index % self.block_size
        return cells.to(self.keys.device)
