"""What a backend computes: the few operations the decoder is made of.

Every backend must keep one invariant: a row's result depends on that row and its own keys and values alone, never
on how many rows the call has, on how a prompt was cut into chunks, or on decode against prefill. Without it,
preemption, chunking and prefix hits would change tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.batch import AdapterRows, Batch
from manyhats.engine.backends.choices import Choices
from manyhats.engine.backends.logprobs import Logprobs
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Linear


class PackedLinear(Protocol):
    """One or more linears over the same input, laid out for a backend."""

    @property
    def out_features(self) -> int:
        """Of all parts together."""
        ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes: weights, quantization statistics and biases."""
        ...


class KVCache(Protocol):
    """Keys and values of every layer, in blocks."""

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ...

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies block source to block target, in every layer, for each (source, target)."""
        ...

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Writes the first P positions of a sequence's blocks; keys and values [L, P, Hkv, K], as they are."""
        ...


class AdapterSlots(Protocol):
    """The loaded adapters, by slot. Slot 0 is the base model and stays empty.

    ``write`` and ``clear`` may run beside a forward, as long as its batch does not name the slot.
    """

    def write(self, slot: int, adapter: LoweredAdapter) -> None:
        """Puts an adapter into a slot.

        Raises:
            ModelError: the backend cannot run it.
        """
        ...

    def clear(self, slot: int) -> None:
        """Frees a slot and its memory."""
        ...

    def num_bytes(self, slot: int) -> int:
        """Resident bytes of one slot."""
        ...

    def add_deltas(
        self,
        fused: str,
        layer: int,
        x: Tensor,
        y: Tensor,
        rows: AdapterRows,
        linear: Callable[[Tensor], Tensor],
    ) -> None:
        """Applies to each row its own adapter's deltas at each part of a fused linear.

        Args:
            fused: name of a group of the block.
            layer: from 0.
            x: [N, d_in] float32, the input of the linear.
            y: [N, d_out of all parts] float32, its output, updated.
            rows: which rows have which adapter.
            linear: runs the fused linear on other inputs, for adapters that rescale them.
        """
        ...

    def add_bottlenecks(
        self, sublayer: str, layer: int, residual: Tensor, output: Tensor, rows: AdapterRows
    ) -> None:
        """Applies to each row its own bottleneck adapter on a sub-layer's output.

        Args:
            sublayer: one of ``architecture.SUBLAYERS``.
            layer: from 0.
            residual: [N, D] float32, the stream that entered the sub-layer.
            output: [N, D] float32, the sub-layer's output, updated.
            rows: which rows have which adapter.
        """
        ...

    def change_embeddings(self, token_ids: Tensor, hidden: Tensor, rows: AdapterRows) -> None:
        """Gives each row its own adapter's embedding.

        Args:
            token_ids: [N] int64.
            hidden: [N, D] float32, the base's embeddings before any multiplier, updated.
            rows: which rows have which adapter.
        """
        ...

    def change_logits(self, hidden: Tensor, logits: Tensor, rows: AdapterRows) -> None:
        """Gives each row its own adapter's output head.

        Args:
            hidden: [M, D] float32, what the head reads.
            logits: [M, V] float32, the base's, before any divisor or cap; updated.
            rows: which of the M rows have which adapter.
        """
        ...


PackedT = TypeVar("PackedT", bound=PackedLinear)
CacheT = TypeVar("CacheT", bound=KVCache)


class Kernels(Protocol[PackedT, CacheT]):
    """The operations of one backend, over its own weights and cache. Activations are float32 throughout."""

    @property
    def name(self) -> str:
        """Shown in server info and logs."""
        ...

    def start_thread(self) -> None:
        """Prepares the calling thread; call it once on each thread that runs the decoder."""
        ...

    def leave_processors(self, count: int) -> None:
        """Leaves this many of the process's processors to other work from now on; on the thread that was started."""
        ...

    def pack(self, parts: Sequence[Linear]) -> PackedT:
        """Lays out linears over the same input as one.

        Raises:
            ModelError: a shape the backend cannot run.
        """
        ...

    def new_cache(self, architecture: Architecture, num_blocks: int, block_size: int, dtype: str) -> CacheT:
        """An empty cache; dtype is ``float32`` or ``bfloat16``."""
        ...

    def new_slots(self, architecture: Architecture, num_slots: int, dtype: str) -> AdapterSlots:
        """Empty slots, for adapters kept in ``float32`` or ``bfloat16``."""
        ...

    def linear(self, x: Tensor, packed: PackedT) -> Tensor:
        """X Wᵀ + b, the parts side by side: [N, d_in] → [N, d_out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """X / √(mean(x²) + eps) · weight, row by row: [N, D] → [N, D]."""
        ...

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Residual += delta; returns the norm of residual."""
        ...

    def norm_queries_and_keys(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, num_queries: int, num_keys: int
    ) -> None:
        """RMS norms of queries and keys, in place, each over as many values at a time as its weight has.

        Args:
            qkv: [N, (H + 2·Hkv)·K], queries then keys then values.
            q_weight: [K] for each head by itself, or [H·K] for all of them at once.
            k_weight: [K] or [Hkv·K].
            eps: added to the mean square.
            num_queries: H·K.
            num_keys: Hkv·K.
        """
        ...

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: CacheT, layer: int, num_heads: int
    ) -> None:
        """Rotates queries and keys by their angles, in place, and writes keys and values into the cache.

        Args:
            qkv: [N, (H + 2·Hkv)·K], queries then keys then values.
            cos: [N, rotary_dim / 2], scaled; without columns nothing is rotated.
            sin: the same shape.
            batch: names each row's KV slot.
            cache: written at ``layer``.
            layer: from 0.
            num_heads: H.
        """
        ...

    def attention(
        self,
        qkv: Tensor,
        batch: Batch,
        cache: CacheT,
        layer: int,
        num_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of each query row over its sequence's cached positions: → [N, H·K].

        Scores are multiplied by ``scale``, then capped: c · tanh(score / c).
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) · up: [N, 2·I] → [N, I]."""
        ...

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """GELU(gate) · up, GELU in its tanh approximation: [N, 2·I] → [N, I]."""
        ...

    def softcap(self, x: Tensor, limit: float) -> None:
        """X = limit · tanh(x / limit), in place: [N, V]."""
        ...

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row of logits [M, V]: → [M] int64, −1 where no token is allowed.

        Edits and masks first, then temperature, top_k, top_p, min_p and typical_p, each over what the ones before
        have left, renormalized; then the draw.
        """
        ...

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """Log softmax(logits)[rows[i], targets[i]] in float64, with ranks, and each row's most likely tokens.

        Args:
            logits: [M, V] float32, finite.
            rows: [P] int64.
            targets: [P] int64 in [0, V).
            num_top: K, V at most.
        """
        ...
