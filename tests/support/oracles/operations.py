"""What each of the CPU's operations and deltas computes, slow and obvious: one row, one head at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters import equations
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    LoweredAdapter,
    LowRank,
)
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.int8 import dequantized, quantized
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.backends.torch.choosing import TorchChooser
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
    """Keys and values as [L, num_blocks · block_size, Hkv, K]; those that int8 would round are kept as float32."""

    def __init__(
        self, architecture: Architecture, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        attention = architecture.attention
        num_cells = num_blocks * block_size
        shape = (architecture.num_layers, num_cells, attention.num_kv_heads, attention.head_dim)
        kept = torch.float32 if dtype == torch.int8 else dtype
        self.keys = torch.zeros(shape, dtype=kept)
        self.values = torch.zeros(shape, dtype=kept)
        self.dtype = dtype
        self.block_size = block_size

    def rounded(self, x: Tensor) -> Tensor:
        """Keys or values as the cache keeps them."""
        return dequantized(*quantized(x)) if self.dtype == torch.int8 else x.to(self.dtype)

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
        self.keys[:, slots] = self.rounded(keys)
        self.values[:, slots] = self.rounded(values)


class ReferenceKernels(TorchChooser):
    """``CpuKernels`` in plain torch; see there for each operation."""

    def pack(self, parts: Sequence[Linear]) -> ReferenceLinear:
        """Dequantizes and concatenates."""
        weights = [
            p.matrix.dequantize() if isinstance(p.matrix, Nf4Weight) else p.matrix.float() for p in parts
        ]
        biases = [torch.zeros(p.out_features) if p.bias is None else p.bias.float() for p in parts]
        return ReferenceLinear(torch.cat(weights), torch.cat(biases))

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
        cache.keys[layer, batch.cells] = cache.rounded(rotated[:, num_heads:])
        cache.values[layer, batch.cells] = cache.rounded(heads[:, num_heads + num_kv_heads :])

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


class ReferenceSlots:
    """The loaded adapters, by slot, as they were lowered; see ``AdapterSlots``."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        self._adapters: dict[int, LoweredAdapter] = {}
        self._groups = [{group.name: group for group in block.groups()} for block in architecture.blocks]
        self._dtype = dtype

    @property
    def memory(self) -> None:
        """Placing takes no time."""
        return None

    def pack(self, adapter: LoweredAdapter) -> LoweredAdapter:
        """As it is."""
        return adapter

    def place(self, slot: int, packed: LoweredAdapter) -> None:
        """Puts an adapter into a slot."""
        self._adapters[slot] = packed

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self._adapters.pop(slot, None)

    def add_deltas(
        self,
        fused: str,
        layer: int,
        x: Tensor,
        y: Tensor,
        rows: AdapterRows,
        linear: Callable[[Tensor], Tensor],
    ) -> None:
        """Each row's own deltas at every part of the fused linear."""
        start = 0
        for member in self._groups[layer][fused].members:
            name, columns = member.name, slice(start, start + member.d_out)
            start = columns.stop
            for row, delta in self._deltas(rows, Site(layer, name)):
                if isinstance(delta, InputScale):
                    y[row, columns] = linear((x[row] * delta.scale.float()).unsqueeze(0))[0, columns]
            for row, delta in self._deltas(rows, Site(layer, name)):
                if isinstance(delta, Affine):
                    scale = 1.0 if delta.scale is None else delta.scale.float()
                    offset = 0.0 if delta.offset is None else delta.offset.float()
                    y[row, columns] = y[row, columns] * scale + offset
            for row, delta in self._deltas(rows, Site(layer, name)):
                if isinstance(delta, LowRank):
                    y[row, columns] += self._low_rank(x[row], delta)

    def add_bottlenecks(
        self, sublayer: str, layer: int, residual: Tensor, output: Tensor, rows: AdapterRows
    ) -> None:
        """Each row's own bottleneck on a sub-layer's output."""
        for row, delta in self._deltas(rows, Site(layer, sublayer)):
            if isinstance(delta, Bottleneck):
                output[row] = equations.bottleneck(delta, residual[row], output[row])

    def change_embeddings(self, token_ids: Tensor, hidden: Tensor, rows: AdapterRows) -> None:
        """Each row's own embedding."""
        for row, delta in self._deltas(rows, None):
            token_id = int(token_ids[row])
            if isinstance(delta, EmbeddingLowRank):
                a, b = self._stored(delta.a), self._stored(delta.b)
                hidden[row] += delta.scale * (b @ a[token_id])
            elif isinstance(delta, EmbeddingRows) and token_id in delta.ids.tolist():
                hidden[row] = self._stored(delta.rows)[delta.ids.tolist().index(token_id)]

    def change_logits(self, hidden: Tensor, logits: Tensor, rows: AdapterRows) -> None:
        """Each row's own output head; a head of the adapter's own comes before what changes it."""
        for row, delta in self._deltas(rows, None):
            if isinstance(delta, HeadWeight):
                logits[row] = self._stored(delta.weight) @ hidden[row]
        for row, delta in self._deltas(rows, None):
            if isinstance(delta, HeadRows):
                logits[row, delta.ids] = self._stored(delta.rows) @ hidden[row]
        for row, delta in self._deltas(rows, Site(-1, "lm_head")):
            if isinstance(delta, LowRank):
                logits[row] += self._low_rank(hidden[row], delta)

    def _low_rank(self, x: Tensor, delta: LowRank) -> Tensor:
        return equations.low_rank(x.unsqueeze(0), self._stored(delta.a), self._stored(delta.b), delta.scale)[
            0
        ]

    def _stored(self, matrix: Tensor) -> Tensor:
        """A matrix as it is kept: rounded to the slots' dtype."""
        return matrix.to(self._dtype).float()

    def _deltas(self, rows: AdapterRows, site: Site | None) -> Iterator[tuple[int, Delta]]:
        """Each row with each of its adapter's deltas at a site, or with all that have none."""
        for row, slot in zip(rows.rows.tolist(), rows.slots.tolist(), strict=True):
            for delta in self._adapters[slot].deltas:
                if getattr(delta, "site", None) == site:
                    yield row, delta
