"""The reference backend: plain torch in float32, slow and obvious. The oracle of every other backend's tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.engine.backends.batch import Batch
from manyhats.engine.backends.choices import Choices
from manyhats.engine.backends.dtypes import torch_dtype
from manyhats.engine.backends.logprobs import Logprobs
from manyhats.engine.backends.reference.adapters import ReferenceSlots
from manyhats.engine.backends.reference.choosing import choose_row
from manyhats.engine.backends.reference.logprobs import logprobs_of
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceLinear:
    """Parts side by side, dequantized: weight [out, in] and bias [out], float32."""

    weight: Tensor
    bias: Tensor

    @property
    def out_features(self) -> int:
        """Of all parts together."""
        return int(self.weight.shape[0])

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return 4 * (self.weight.numel() + self.bias.numel())


class ReferenceKVCache:
    """Keys and values as [L, num_blocks · block_size, Hkv, K]."""

    def __init__(
        self, architecture: Architecture, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        attention = architecture.attention
        num_cells = num_blocks * block_size
        shape = (architecture.num_layers, num_cells, attention.num_kv_heads, attention.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies block source to block target in every layer."""
        size = self.block_size
        for source, target in copies:
            for part in (self.keys, self.values):
                part[:, target * size : (target + 1) * size] = part[:, source * size : (source + 1) * size]

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes positions 0 … P − 1 of the blocks; keys and values [L, P, Hkv, K]."""
        positions = torch.arange(keys.shape[1])
        slots = torch.tensor(blocks)[positions // self.block_size] * self.block_size
        slots += positions % self.block_size
        self.keys[:, slots] = keys.to(self.keys.dtype)
        self.values[:, slots] = values.to(self.values.dtype)


class ReferenceKernels:
    """``Kernels`` in plain torch; see there for each operation."""

    name = "reference"

    def start_thread(self) -> None:
        """Nothing to prepare."""

    def leave_processors(self, count: int) -> None:
        """Does nothing."""

    def pack(self, parts: Sequence[Linear]) -> ReferenceLinear:
        """Dequantizes and concatenates."""
        weights = [
            p.matrix.dequantize() if isinstance(p.matrix, Nf4Weight) else p.matrix.float() for p in parts
        ]
        biases = [torch.zeros(p.out_features) if p.bias is None else p.bias.float() for p in parts]
        return ReferenceLinear(torch.cat(weights), torch.cat(biases))

    def new_cache(
        self, architecture: Architecture, num_blocks: int, block_size: int, dtype: str
    ) -> ReferenceKVCache:
        """An empty cache."""
        return ReferenceKVCache(architecture, num_blocks, block_size, torch_dtype(dtype))

    def new_slots(self, architecture: Architecture, num_slots: int, dtype: str) -> ReferenceSlots:
        """Empty adapter slots."""
        return ReferenceSlots(architecture, torch_dtype(dtype))

    def linear(self, x: Tensor, packed: ReferenceLinear) -> Tensor:
        """X Wᵀ + b, one row at a time: a matrix product's rounding may depend on its number of rows."""
        return torch.stack([packed.weight @ row + packed.bias for row in x])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of each row."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Residual += delta; returns the norm of residual."""
        residual += delta
        return self.rms_norm(residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) · up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """GELU(gate) · up, in the tanh approximation."""
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def softcap(self, x: Tensor, limit: float) -> None:
        """X = limit · tanh(x / limit), in place."""
        for row in x:
            row.copy_(limit * torch.tanh(row / limit))

    def norm_queries_and_keys(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, num_queries: int, num_keys: int
    ) -> None:
        """Root mean square norms of queries and keys, in place."""
        keys_end = num_queries + num_keys
        for part, weight in ((qkv[:, :num_queries], q_weight), (qkv[:, num_queries:keys_end], k_weight)):
            groups = part.unflatten(1, (-1, weight.numel()))
            groups.copy_(self.rms_norm(groups, weight, eps))

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        cache: ReferenceKVCache,
        layer: int,
        num_heads: int,
    ) -> None:
        """Rotates queries and keys in place and writes keys and values into the cache."""
        num_kv_heads, head_dim = cache.keys.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        half = cos.shape[1]
        rotated = heads[:, : num_heads + num_kv_heads]
        first, second = rotated[..., :half].clone(), rotated[..., half : 2 * half].clone()
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        rotated[..., :half] = first * c - second * s
        rotated[..., half : 2 * half] = second * c + first * s
        cache.keys[layer, batch.slot_mapping] = rotated[:, num_heads:].to(cache.keys.dtype)
        cache.values[layer, batch.slot_mapping] = heads[:, num_heads + num_kv_heads :].to(cache.values.dtype)

    def attention(
        self,
        qkv: Tensor,
        batch: Batch,
        cache: ReferenceKVCache,
        layer: int,
        num_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention, one query row and head at a time."""
        num_kv_heads, head_dim = cache.keys.shape[2:]
        queries = qkv.view(qkv.shape[0], -1, head_dim)
        out = torch.empty(qkv.shape[0], num_heads, head_dim)
        starts = batch.query_start.tolist()
        for sequence, length in enumerate(batch.context_len.tolist()):
            positions = torch.arange(length)
            blocks = batch.block_tables[sequence, positions // cache.block_size].long()
            slots = blocks * cache.block_size + positions % cache.block_size
            first, last = starts[sequence], starts[sequence + 1]
            for row in range(first, last):
                end = length - (last - row) + 1
                begin = max(0, end - window) if window else 0
                keys = cache.keys[layer, slots[begin:end]].float()
                values = cache.values[layer, slots[begin:end]].float()
                for head in range(num_heads):
                    kv_head = head // (num_heads // num_kv_heads)
                    scores = keys[:, kv_head] @ queries[row, head] * scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    weights = torch.softmax(scores, dim=0)
                    out[row, head] = weights @ values[:, kv_head]
        return out.view(qkv.shape[0], -1)

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row."""
        tokens = [choose_row(row, choices, index) for index, row in enumerate(logits)]
        return torch.tensor(tokens, dtype=torch.int64)

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """Log-probabilities of targets, with ranks, and each row's most likely tokens."""
        return logprobs_of(logits, rows, targets, num_top)
