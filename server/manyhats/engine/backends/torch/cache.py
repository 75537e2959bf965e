"""Keys and values in a device's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.int8 import dequantized, quantized
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.torch.upload import uploaded
from manyhats.engine.model.architecture import Architecture


class TorchKVCache:
    """Keys and values as [L, num_blocks · block_size, Hkv, K]; as int8 with a scale for each head of each cell."""

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
        scales = shape[:-1] if dtype == torch.int8 else (0,)
        self._key_scales = torch.zeros(scales, device=device)
        self._value_scales = torch.zeros(scales, device=device)
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return sum(part.nbytes for part in self._parts())

    def _parts(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self._key_scales, self._value_scales

    def store(self, layer: int | slice, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Rounds keys and values [..., cells, Hkv, K] into cells of a layer, or of all."""
        for given, stored, scales in (
            (keys, self.keys, self._key_scales),
            (values, self.values, self._value_scales),
        ):
            if stored.dtype == torch.int8:
                stored[layer, cells], scales[layer, cells] = quantized(given.to(scales))
            else:
                stored[layer, cells] = given.to(stored)

    def read(self, layer: int, cells: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's cells, each [..., Hkv, K] for cells [...]."""
        if self.keys.dtype != torch.int8:
            return self.keys[layer, cells].to(dtype), self.values[layer, cells].to(dtype)
        return (
            dequantized(self.keys[layer, cells], self._key_scales[layer, cells]).to(dtype),
            dequantized(self.values[layer, cells], self._value_scales[layer, cells]).to(dtype),
        )

    def copy_blocks(self, plan: StepPlan) -> None:
        """Copies the blocks that a step wants copied, in every layer."""
        size = self.block_size
        for source, target in plan.block_copies:
            for part in self._parts():
                if not part.numel():
                    continue
                part[:, target * size : (target + 1) * size] = part[:, source * size : (source + 1) * size]

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes cells 0 … P − 1 of the blocks; keys and values [L, P, Hkv, K]."""
        cells = self.cells_of(torch.tensor(blocks), keys.shape[1])
        device = self.keys.device
        self.store(slice(None), cells, uploaded(keys, device), uploaded(values, device))

    def cells_of(self, blocks: Tensor, count: int) -> Tensor:
        """The first ``count`` cells of blocks in order: int64 on the cache's device."""
        index = torch.arange(count)
        cells = blocks.long()[index // self.block_size] * self.block_size + index % self.block_size
        return uploaded(cells, self.keys.device)
