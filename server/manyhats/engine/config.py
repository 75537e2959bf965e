"""The engine's configuration: frozen, checked when made; ``auto`` is resolved by ``resolve``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.scheduling.schedule import SchedulerConfig

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and sizes of one engine.

    Attributes:
        dtype: of embeddings, adapters and, unless named, the KV cache; ``auto`` is ``bfloat16``. Arithmetic is
            float32 either way, but for NF4 linears on processors with AVX512-BF16, which ``bfloat16`` makes use of.
        kv_cache_dtype: ``auto`` is ``dtype``.
        kv_cache_bytes: memory for keys and values.
        block_size: positions per KV block.
        max_num_sequences: that run at a time.
        max_num_batched_tokens: rows of one step; a longer prompt is cut into chunks.
        max_waiting: requests in the queue.
        max_bulk_tokens: rows of scorings and of prompts that take several steps, in a step beside other requests. More
            of them keep others' tokens waiting for longer, fewer make them take longer themselves.
        max_score_tokens: prompt and all continuations of one scoring together.
        max_loaded_adapters: adapters in memory at a time.
        max_adapter_bytes: their memory; those in use are never evicted for it.
        max_unread_outputs: of one generation, before it pauses until its reader takes some.
        max_unread_bytes: or their size, which log-probabilities make large.
        unread_limit_s: a generation that pauses for so long with nothing read is ended.
        num_threads: of the kernels; 0 is one per core.
    """

    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int = 1024 * MIB
    block_size: int = 16
    max_num_sequences: int = 64
    max_num_batched_tokens: int = 256
    max_waiting: int = 1024
    max_bulk_tokens: int = 8
    max_score_tokens: int = 65_536
    max_loaded_adapters: int = 256
    max_adapter_bytes: int = 2048 * MIB
    max_unread_outputs: int = 256
    max_unread_bytes: int = MIB
    unread_limit_s: float = 60.0
    num_threads: int = 0

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_cache_dtype"):
            if getattr(self, name) not in ("auto", "float32", "bfloat16"):
                raise FieldInvalidError(
                    f"engine.{name}", f"must be auto, float32 or bfloat16, not {getattr(self, name)!r}"
                )
        for name in (
            "kv_cache_bytes",
            "block_size",
            "max_loaded_adapters",
            "max_adapter_bytes",
            "max_unread_outputs",
            "max_unread_bytes",
            "max_score_tokens",
        ):
            if getattr(self, name) < 1:
                raise FieldInvalidError(f"engine.{name}", f"must be at least 1, not {getattr(self, name)}")
        if not 0 < self.unread_limit_s < math.inf:
            raise FieldInvalidError(
                "engine.unread_limit_s", f"must be over 0 seconds, not {self.unread_limit_s}"
            )
        if self.num_threads < 0:
            raise FieldInvalidError("engine.num_threads", f"must be 0 (all) or more, not {self.num_threads}")
        _ = self.scheduler  # its own checks

    @property
    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part."""
        return SchedulerConfig(
            max_num_sequences=self.max_num_sequences,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            max_bulk_tokens=self.max_bulk_tokens,
        )


def resolve(config: EngineConfig) -> EngineConfig:
    """The same configuration with nothing left as ``auto``."""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    kv_cache_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return replace(config, dtype=dtype, kv_cache_dtype=kv_cache_dtype)


def kv_bytes_per_token(architecture: Architecture, itemsize: int) -> int:
    """Keys and values of one position in all layers, given the bytes per value."""
    return 2 * architecture.num_layers * architecture.attention.key_size * itemsize


def num_blocks_of(config: EngineConfig, architecture: Architecture) -> int:
    """Blocks that fit into ``kv_cache_bytes``, but no more than every sequence can use at full length."""
    itemsize = 4 if config.kv_cache_dtype == "float32" else 2
    block_bytes = kv_bytes_per_token(architecture, itemsize) * config.block_size
    most = config.max_num_sequences * -(-architecture.max_context_length // config.block_size)
    num_blocks = min(config.kv_cache_bytes // block_bytes, most)
    if num_blocks < 1:
        raise FieldInvalidError("engine.kv_cache_bytes", f"must be at least one block of {block_bytes} bytes")
    return int(num_blocks)
