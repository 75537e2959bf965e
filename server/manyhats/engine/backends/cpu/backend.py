"""The Numba backend: every operation of the decoder on the CPU, weights read in place."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.batch import Batch
from manyhats.engine.backends.choices import Choices
from manyhats.engine.backends.cpu import attention as attention_kernels
from manyhats.engine.backends.cpu import avx512_bf16, rowwise
from manyhats.engine.backends.cpu import linear as linear_kernels
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.avx512_bf16 import Avx512Bf16Linear
from manyhats.engine.backends.cpu.choosing.choosing import TokenChooser
from manyhats.engine.backends.cpu.choosing.logprobs import score
from manyhats.engine.backends.cpu.compile import max_threads
from manyhats.engine.backends.cpu.packing import LANES, CpuLinear, as_array, pack_linear
from manyhats.engine.backends.dtypes import torch_dtype
from manyhats.engine.backends.logprobs import Logprobs
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Linear
from manyhats.engine.threads.processors import num_processors

_VECTOR_PAIR = 16
"""Positions and head values are handled sixteen at a time."""


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
        self._dtype = dtype
        self.keys = tuple(self._keys)
        self.values = tuple(self._values)

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self._keys.nbytes + self._values.nbytes

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies block source to block target in every layer."""
        for source, target in copies:
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes positions 0 … P − 1 of the blocks; keys and values [L, P, Hkv, K]."""
        block_size = self._keys.shape[4]
        stored = [as_array(part.to(self._dtype)) for part in (keys, values)]
        for index, block in enumerate(blocks):
            part = slice(index * block_size, (index + 1) * block_size)
            count = stored[0][:, part].shape[1]
            self._keys[:, block, :, :, :count] = stored[0][:, part].transpose(0, 2, 3, 1)
            self._values[:, block, :, :count] = stored[1][:, part].transpose(0, 2, 1, 3)


class CpuKernels:
    """``Kernels`` on the CPU; see there for each operation.

    Its only state is scratch memory, so one instance serves one forward at a time.

    Args:
        num_threads: None is one per core.
        is_exact: False lets NF4 linears run in bfloat16 where the processor has instructions for it.
    """

    def __init__(self, num_threads: int | None = None, *, is_exact: bool = True) -> None:
        self.num_threads = min(num_threads or torch.get_num_threads(), max_threads())
        self._uses_bf16 = not is_exact and avx512_bf16.is_available()
        numba.set_num_threads(self.num_threads)
        self._panels: dict[tuple[int, int], np.ndarray] = {}
        self._scores = np.empty((self.num_threads, 0), dtype=np.float32)
        self._chooser = TokenChooser(self.num_threads)
        self._num_used = self.num_threads

    @property
    def name(self) -> str:
        """Which kernels run the NF4 linears."""
        return "cpu-avx512-bf16" if self._uses_bf16 else "cpu-numba"

    def start_thread(self) -> None:
        """Gives the calling thread this backend's number of threads, and other threads of the process one of torch's.

        Numba and torch both keep the number per thread, torch with the latest one set as the default of the others.
        A second team would make this one's threads sleep between loops (``own_thread``).
        """
        self._use_threads(self.num_threads)

    def _use_threads(self, count: int) -> None:
        self._num_used = count
        numba.set_num_threads(count)
        torch.set_num_threads(count)
        torch.get_num_threads()  # a thread takes the default over at its first look, and keeps its own from then on
        others = threading.Thread(target=torch.set_num_threads, args=(1,))
        others.start()
        others.join()

    def leave_processors(self, count: int) -> None:
        """Uses no more threads from now on than the processors left over can run, but at least one.

        Work is divided as before, so the numbers are the same.
        """
        num_used = max(min(self.num_threads, num_processors() - count), 1)
        if num_used != self._num_used:
            self._use_threads(num_used)

    def pack(self, parts: Sequence[Linear]) -> CpuLinear | Avx512Bf16Linear:
        """Lays out linears over the same input as one."""
        exact = pack_linear(parts)
        if not self._uses_bf16 or not avx512_bf16.fits(parts):
            return exact
        packed = avx512_bf16.pack(parts)
        expected = self.linear(avx512_bf16.check_input(exact.in_features), exact).numpy()
        error = avx512_bf16.relative_error(packed, expected)
        if not avx512_bf16.is_close_enough(error):
            raise ModelError(
                f"bitsandbytes' AVX512-BF16 kernel is off by {error:.1%} on this processor; "
                "serve with dtype float32, which does not use it"
            )
        return packed

    def new_cache(
        self, architecture: Architecture, num_blocks: int, block_size: int, dtype: str
    ) -> CpuKVCache:
        """An empty cache.

        Raises:
            ModelError: the block size or the head is not a multiple of 16.
        """
        head_dim = architecture.attention.head_dim
        rotary_dims = [block.attention.rotary_dim for block in architecture.blocks]
        if any(size % _VECTOR_PAIR for size in (block_size, head_dim, *rotary_dims)):
            rotated = max(rotary_dims)
            raise ModelError(
                f"the CPU kernels need a block size (here {block_size}), a head size (here {head_dim}) "
                f"and a rotated part of it (here {rotated}) that are multiples of {_VECTOR_PAIR}"
            )
        return CpuKVCache(architecture, num_blocks, block_size, torch_dtype(dtype))

    def new_slots(self, architecture: Architecture, num_slots: int, dtype: str) -> CpuAdapterSlots:
        """Empty adapter slots."""
        return CpuAdapterSlots(architecture, num_slots, torch_dtype(dtype), self.num_threads, self.linear)

    def linear(self, x: Tensor, packed: CpuLinear | Avx512Bf16Linear) -> Tensor:
        """X Wᵀ + b."""
        if isinstance(packed, Avx512Bf16Linear):
            return packed(x)
        y = torch.empty((x.shape[0], packed.out_features))
        linear_kernels.linear(
            x.numpy(),
            packed.weights,
            packed.absmax,
            packed.row_block,
            packed.row_offset,
            packed.nested,
            packed.nested_code,
            packed.bias,
            y.numpy(),
            self._panel(packed),
            packed.panel_rows,
        )
        return y

    def _panel(self, packed: CpuLinear) -> np.ndarray:
        shape = (self.num_threads, packed.panel_rows * packed.in_features)
        panel = self._panels.get(shape)
        if panel is None:
            panel = self._panels[shape] = np.empty(shape, dtype=np.float32)
        return panel

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of each row."""
        out = torch.empty_like(x)
        rowwise.rms_norm(x.numpy(), weight.numpy(), np.float32(eps), out.numpy(), self._row_threads(x))
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Residual += delta; returns the norm of residual."""
        out = torch.empty_like(residual)
        rowwise.add_rms_norm(
            residual.numpy(),
            delta.numpy(),
            weight.numpy(),
            np.float32(eps),
            out.numpy(),
            self._row_threads(out),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) · up."""
        out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2))
        rowwise.silu_mul(gate_up.numpy(), out.numpy(), self._row_threads(out))
        return out

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """GELU(gate) · up, in the tanh approximation."""
        out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2))
        rowwise.gelu_tanh_mul(gate_up.numpy(), out.numpy(), self._row_threads(out))
        return out

    def softcap(self, x: Tensor, limit: float) -> None:
        """X = limit · tanh(x / limit), in place.

        Raises:
            ModelError: the rows are shorter than a vector.
        """
        if x.shape[1] < LANES:
            raise ModelError(f"the CPU kernels cap rows of at least {LANES} values, not {x.shape[1]}")
        rowwise.softcap(x.numpy(), np.float32(limit), self._row_threads(x))

    def norm_queries_and_keys(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, num_queries: int, num_keys: int
    ) -> None:
        """Root mean square norms of queries and keys, in place."""
        rowwise.norm_queries_and_keys(
            qkv.numpy(),
            q_weight.numpy(),
            k_weight.numpy(),
            np.float32(eps),
            num_queries,
            num_keys,
            self._row_threads(qkv),
        )

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        cache: CpuKVCache,
        layer: int,
        num_heads: int,
    ) -> None:
        """Rotates queries and keys in place and writes keys and values into the cache."""
        rowwise.rotate_and_store(
            qkv.numpy(),
            cos.numpy(),
            sin.numpy(),
            batch.slot_mapping.numpy(),
            cache.keys[layer],
            cache.values[layer],
            num_heads,
            self._row_threads(qkv),
        )

    def attention(
        self,
        qkv: Tensor,
        batch: Batch,
        cache: CpuKVCache,
        layer: int,
        num_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of each query row over its sequence's cached positions."""
        keys = cache.keys[layer]
        block_size = keys.shape[3]
        longest = batch.block_tables.shape[1] * block_size
        if self._scores.shape[1] < 4 * longest:
            self._scores = np.empty((self.num_threads, 4 * longest), dtype=np.float32)
        out = torch.empty((qkv.shape[0], num_heads * keys.shape[2]))
        attention_kernels.paged_attention(
            qkv.numpy(),
            batch.tiles.numpy(),
            batch.query_start.numpy(),
            batch.context_len.numpy(),
            batch.block_tables.numpy(),
            keys,
            cache.values[layer],
            np.float32(scale),
            np.float32(softcap or 0.0),
            window or 0,
            out.numpy(),
            self._scores,
        )
        return out

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row."""
        return self._chooser.choose(logits, choices)

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """Log-probabilities of targets, with ranks, and each row's most likely tokens."""
        num_rows, num_pairs = logits.shape[0], targets.shape[0]
        found = Logprobs(
            np.empty(num_pairs),
            np.empty(num_pairs, dtype=np.int64),
            np.empty((num_rows, num_top), dtype=np.int64),
            np.empty((num_rows, num_top)),
        )
        score(
            logits.contiguous().numpy(),
            rows.numpy(),
            targets.numpy(),
            found.logprobs,
            found.ranks,
            found.top_ids,
            found.top_logprobs,
            np.empty(num_rows),
            min(self.num_threads, max(num_rows, num_pairs)),
        )
        return found

    def _row_threads(self, x: Tensor) -> int:
        """A few rows are quicker on one thread than the other threads are woken."""
        return self.num_threads if x.shape[0] > 2 else 1
