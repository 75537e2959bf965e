"""The CPU's operations one at a time, and what they act on; a forward runs them as one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.cpu import columns
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.attention.units import Units
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.forward import ACTIVATIONS
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear
from manyhats.engine.backends.cpu.program import PackedNorm, Program
from manyhats.engine.backends.dtypes import cache_dtype, torch_dtype
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.model.architecture import SUBLAYERS, Architecture, Norm
from manyhats.engine.model.weights import NormWeight
from support.oracles.operations import ReferenceKVCache, ReferenceSlots


def from_python(inner: Any) -> Any:
    """A kernel's function as one that Python can call."""

    @njit
    def call(*arguments):  # type: ignore[no-untyped-def]
        return inner(*arguments)

    return call


class Operations(CpuKernels):
    """Each instruction as a call, on tensors [N, …] float32."""

    def norm(self, x: Tensor, norm: Norm, weights: NormWeight) -> Tensor:
        """The norm of each row."""
        out, program = torch.empty_like(x), Program()
        program.norm(0, 1, PackedNorm.of(norm, weights))
        self.run_alone(program, [x, out])
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The RMS norm of each row."""
        return self.norm(x, Norm(eps), NormWeight(weight))

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Residual += delta; the norm of residual."""
        out, program = torch.empty_like(residual), Program()
        program.add_norm(0, 1, 2, PackedNorm.of(Norm(eps), NormWeight(weight)))
        self.run_alone(program, [delta, residual, out])
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) · up."""
        return self.activate("silu", gate_up, is_gated=True)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """GELU(gate) · up, in the tanh approximation."""
        return self.activate("gelu_pytorch_tanh", gate_up, is_gated=True)

    def activate(self, name: str, x: Tensor, is_gated: bool) -> Tensor:
        """An activation of each row, or of its first half times the second."""
        size, program = x.shape[1] // (1 + is_gated), Program()
        out = torch.empty((x.shape[0], size))
        program.activate(ACTIVATIONS[name], 0, 1, size, is_gated)
        self.run_alone(program, [x, out])
        return out

    def norm_queries_and_keys(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, num_queries: int, num_keys: int
    ) -> None:
        """Norms of queries and keys, in place."""
        program = Program()
        queries, keys = (PackedNorm.of(Norm(eps), NormWeight(weight)) for weight in (q_weight, k_weight))
        program.norm_heads(0, qkv.shape[1], (queries, num_queries), (keys, num_keys))
        self.run_alone(program, [qkv])

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: Any, layer: int, num_heads: int
    ) -> None:
        """Rotates queries and keys by each row's angles, in place; writes keys and values into the cache."""
        program, rows = Program(), torch.arange(qkv.shape[0], dtype=torch.int32)
        program.rotate(0, qkv.shape[1], layer, (cos.contiguous(), sin.contiguous()), num_heads)
        frame = self._frame(batch, cache)
        frame[columns.POSITIONS] = rows.data_ptr()
        self.run(program.arrays(), frame, [qkv], (cache.dtype, torch.float32), 0)

    def attention(
        self,
        qkv: Tensor,
        batch: Batch,
        cache: Any,
        layer: int,
        num_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sees_all: bool = False,
    ) -> Tensor:
        """Attention of each row over its sequence's cached positions."""
        frame, program = self._frame(batch, cache), Program()
        head_dim, num_kv_heads = int(frame[columns.HEAD_DIM]), int(frame[columns.NUM_KV_HEADS])
        out = torch.empty((qkv.shape[0], num_heads * head_dim))
        sizes = qkv.shape[1], out.shape[1]
        program.attention(0, 1, sizes, layer, scale, window, softcap, sees_all)
        units = Units.of(
            batch.query_start.numpy(),
            batch.context_len.numpy(),
            (num_heads, num_kv_heads, head_dim),
            cache.block_size,
            self.num_threads,
            sees_all=sees_all,
        )
        units.describe(frame)
        self.run(program.arrays(), frame, [qkv, out], (cache.dtype, torch.float32), units.num_scratch_values)
        return out

    @staticmethod
    def _frame(batch: Batch, cache: CpuKVCache) -> Any:
        frame = np.zeros(columns.FRAME_SIZE, dtype=np.int64)
        batch.describe(frame)
        cache.describe(frame)
        return frame


class OperationSlots(CpuAdapterSlots):
    """Slots whose deltas are added in a call of their own."""

    def __init__(
        self, architecture: Architecture, num_slots: int, dtype: torch.dtype, kernels: CpuKernels
    ) -> None:
        super().__init__(architecture, num_slots, dtype, kernels.linear)
        self._groups = list(architecture.shared_groups())
        self._kernels = kernels

    def add_deltas(
        self,
        fused: str,
        layer: int,
        x: Tensor,
        y: Tensor,
        rows: AdapterRows,
        packed: CpuLinear | Callable[[Tensor], Tensor],
    ) -> None:
        """Each row's own deltas at a group of linears, which ``packed`` holds where an input is rescaled."""
        program, group = Program(), self._groups.index(fused)
        if isinstance(packed, CpuLinear):
            program.rescaled(0, 1, packed, group, layer)
        program.deltas(0, 1, (x.shape[1], y.shape[1]), group, layer)
        self._run(program, [x, y], rows)

    def add_bottlenecks(
        self, sublayer: str, layer: int, residual: Tensor, output: Tensor, rows: AdapterRows
    ) -> None:
        """Each row's own bottleneck on a sub-layer's output."""
        program = Program()
        program.bottleneck(0, 1, output.shape[1], SUBLAYERS.index(sublayer), layer)
        self._run(program, [residual, output], rows)

    def _run(self, program: Program, buffers: list[Tensor], rows: AdapterRows) -> None:
        frame = np.zeros(columns.FRAME_SIZE, dtype=np.int64)
        frame[columns.NUM_ROWS] = buffers[0].shape[0]
        described = self.describe(rows, frame)
        num_values = max(program.num_scratch_values, self.num_scratch_values)
        self._kernels.run(program.arrays(), frame, buffers, (self.dtype, self.dtype), num_values)
        del described  # the frame had its addresses


def new_cache(kernels: Any, architecture: Architecture, num_blocks: int, block_size: int, dtype: str) -> Any:
    """An empty cache."""
    kind = CpuKVCache if isinstance(kernels, CpuKernels) else ReferenceKVCache
    return kind(architecture, num_blocks, block_size, cache_dtype(dtype))


def new_slots(kernels: Any, architecture: Architecture, num_slots: int, dtype: str) -> Any:
    """Empty slots."""
    if isinstance(kernels, CpuKernels):
        return OperationSlots(architecture, num_slots, torch_dtype(dtype), kernels)
    return ReferenceSlots(architecture, torch_dtype(dtype))


def put(slots: Any, slot: int, adapter: LoweredAdapter) -> None:
    """Pack and place an adapter."""
    slots.place(slot, slots.pack(adapter))
