"""The operations of a forward on the CPU, in Numba; weights are read in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.choosing import Logprobs
from manyhats.engine.backends.cpu import attention as attention_kernels
from manyhats.engine.backends.cpu import avx512_bf16, rowwise
from manyhats.engine.backends.cpu import linear as linear_kernels
from manyhats.engine.backends.cpu.avx512_bf16 import Avx512Bf16Linear
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.choosing.choosing import TokenChooser
from manyhats.engine.backends.cpu.choosing.logprobs import score
from manyhats.engine.backends.cpu.compile import max_threads
from manyhats.engine.backends.cpu.packing import LANES, CpuLinear, pack_linear
from manyhats.engine.backends.wants import Choices
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import has_bf16_product
from manyhats.engine.model.weights import Linear
from manyhats.engine.threads.processors import num_processors


class CpuKernels:
    """``Kernels`` on the CPU; see there for each operation.

    Its only state is scratch memory, so one instance serves one forward at a time.

    Args:
        num_threads: None is one per core.
        is_exact: False lets NF4 linears run in bfloat16 where the processor has instructions for it.

    Attributes:
        num_threads: of the kernels.
        uses_bf16: whether NF4 linears do.
    """

    def __init__(self, num_threads: int | None = None, *, is_exact: bool = True) -> None:
        self.num_threads = min(num_threads or torch.get_num_threads(), max_threads())
        self.uses_bf16 = not is_exact and has_bf16_product()
        numba.set_num_threads(self.num_threads)
        self._panels: dict[tuple[int, int], np.ndarray] = {}
        self._scores = np.empty((self.num_threads, 0), dtype=np.float32)
        self._chooser = TokenChooser(self.num_threads)
        self._num_used = self.num_threads

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
        if not self.uses_bf16 or not avx512_bf16.fits(parts):
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

    def gate(self, activation: str) -> Callable[[Tensor], Tensor]:
        """What gates with an activation: ``activation(gate) · up``, [N, 2·I] → [N, I].

        Raises:
            ModelError: there is no kernel for it.
        """
        gates = {"silu": self.silu_mul, "gelu_pytorch_tanh": self.gelu_tanh_mul}
        if activation not in gates:
            known = ", ".join(sorted(gates))
            raise ModelError(f"the CPU kernels do not know the activation {activation!r}; they know {known}")
        return gates[activation]

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
            batch.cells.numpy(),
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
