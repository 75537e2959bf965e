"""The engine's configuration: frozen, checked when made; ``auto`` is resolved by ``resolve``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from manyhats.engine.backends.limits import Limits
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.settings.declaration import setting
from manyhats.settings.reading import Wording, check

if TYPE_CHECKING:
    from manyhats.engine.model.architecture import Architecture

Dtype = Literal["auto", "bfloat16", "float32"]
Invariance = Literal["strict", "fast"]
CacheDtype = Literal["auto", "bfloat16", "float32", "int8"]

MIB = 2**20

_LIMITS = "Limits"
_WORDING = Wording(error=lambda name, problem: FieldInvalidError(f"engine.{name}", problem), shows_value=True)


DEFAULT_KV_CACHE_BYTES = 1024 * MIB
"""On a CPU."""
_MOST_GPU_ADAPTER_BYTES = 2048 * MIB
"""Unless a setting says otherwise: what the host can spare, a GPU often cannot."""
_ENCODER_STEP = 4
"""Times the tokens of a step: enough that what it costs besides them is little, few enough for the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and sizes of one engine.

    Attributes:
        dtype: of embeddings, adapters and, by default, the KV cache; ``auto`` is ``bfloat16``. Arithmetic is float32
            either way, except that with ``bfloat16`` NF4 linears take 16-bit integers where the processor has AVX2, and
            dense ones bfloat16 where it has AVX512-BF16.
        max_num_batched_tokens: longer prompts are split into chunks.
        max_bulk_tokens: larger values delay other requests' tokens; smaller ones make bulk work take longer.
        max_adapter_bytes: adapters in use are never evicted; while they fill it, requests for others wait.
        block_size: positions per KV block.
        max_unread_outputs: of one generation, before it pauses for its reader.
        max_unread_bytes: the same, by size, which log-probabilities make large.

    Raises:
        FieldInvalidError: one is out of its range.
    """

    dtype: Dtype = setting("auto", group="Model", help="The number format to compute in; auto is bfloat16.")
    invariance: Invariance = setting(
        "strict",
        group="Model",
        help="On a GPU: strict, a request has the same results whatever runs beside it; or fast, libraries' kernels, "
        "chosen by how much there is to do. On a CPU it is always strict.",
    )
    max_num_sequences: int = setting(
        64, name="max_sequences", at_least=1, group=_LIMITS, help="Sequences that run at once."
    )
    max_num_batched_tokens: int = setting(
        256,
        name="max_batched_tokens",
        at_least=1,
        group=_LIMITS,
        help="Tokens of one step, of an encoder four times as many.",
    )
    kv_cache_bytes: int | None = setting(
        None,
        unit="bytes",
        at_least=1,
        group=_LIMITS,
        shown="1GiB; on a GPU, what is left",
        help="Memory for the KV cache.",
    )
    gpu_memory_fraction: float = setting(
        0.9,
        above=0,
        at_most=1,
        group=_LIMITS,
        help="How much of a GPU's memory may be taken, where --kv-cache-bytes does not say.",
    )
    kv_cache_dtype: CacheDtype = setting(
        "auto",
        group=_LIMITS,
        help="The number format of the KV cache; auto is --dtype. int8 takes half the memory of bfloat16, "
        "and is less exact.",
    )
    max_loaded_adapters: int = setting(
        256,
        name="max_adapters",
        at_least=1,
        group=_LIMITS,
        help="Adapters that requests run on at once; others stay in memory.",
    )
    max_adapter_bytes: int = setting(
        2048 * MIB,
        name="adapter_memory_bytes",
        unit="bytes",
        at_least=1,
        group=_LIMITS,
        help="Memory of the loaded adapters, on a GPU the host's.",
    )
    gpu_adapter_bytes: int | None = setting(
        None,
        unit="bytes",
        at_least=1,
        group=_LIMITS,
        shown="--adapter-memory-bytes, at most 2GiB",
        help="A GPU's memory for the adapters that requests run on at once; others are copied to it when it is "
        "their turn.",
    )
    max_waiting: int = setting(1024, at_least=1, group=_LIMITS, help="Requests that may wait.")
    max_waiting_tokens: int = setting(
        1_048_576, at_least=1, group=_LIMITS, help="Tokens of their prompts, unless only one waits."
    )
    max_bulk_tokens: int = setting(
        8,
        at_least=1,
        group=_LIMITS,
        help="Most tokens of scorings and long prompts in a step with other requests; fewer where they take long.",
    )
    max_score_tokens: int = setting(
        65_536, at_least=1, group=_LIMITS, help="Prompt and all continuations of one scoring."
    )
    unread_limit_s: float = setting(
        60.0,
        unit="seconds",
        above=0,
        group=_LIMITS,
        help="Abandon an answer that nobody reads for this long.",
    )
    num_threads: int = setting(
        0,
        at_least=0,
        must="must be 0 or more",
        group=_LIMITS,
        help="Threads of the kernels; 0 for one per core.",
    )
    block_size: int = 16
    max_unread_outputs: int = 256
    max_unread_bytes: int = MIB

    def __post_init__(self) -> None:
        check(self, _WORDING)
        for name in ("block_size", "max_unread_outputs", "max_unread_bytes"):
            if getattr(self, name) < 1:
                raise FieldInvalidError(f"engine.{name}", f"must be at least 1, not {getattr(self, name)}")
        _ = self.scheduler  # its own checks

    @property
    def scheduler(self) -> SchedulerConfig:
        """The scheduler's limits."""
        return SchedulerConfig(
            max_num_sequences=self.max_num_sequences,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            max_bulk_tokens=self.max_bulk_tokens,
        )


def resolve(config: EngineConfig) -> EngineConfig:
    """The same configuration with nothing left as ``auto``."""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    kv_cache_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return replace(config, dtype=dtype, kv_cache_dtype=kv_cache_dtype)


def scheduler_config(config: EngineConfig, architecture: Architecture) -> SchedulerConfig:
    """The scheduler's limits. An encoder's steps are larger: there, no other request waits for its next token."""
    limits = config.scheduler
    if not architecture.attention.sees_all:
        return limits
    return replace(limits, max_num_batched_tokens=_ENCODER_STEP * limits.max_num_batched_tokens)


def limits_of(config: EngineConfig, architecture: Architecture) -> Limits:
    """What a backend may be asked for; an encoder's text is run whole, however long."""
    scheduler = scheduler_config(config, architecture)
    longest = architecture.max_context_length if architecture.attention.sees_all else 1
    return Limits(
        max_rows=max(scheduler.max_num_batched_tokens, longest),
        max_draft_rows=scheduler.max_draft_rows,
        max_sequences=config.max_num_sequences,
        adapter_bytes=_gpu_adapter_bytes(config),
        memory_fraction=config.gpu_memory_fraction,
    )


def _gpu_adapter_bytes(config: EngineConfig) -> int:
    if config.gpu_adapter_bytes is None:
        return min(config.max_adapter_bytes, _MOST_GPU_ADAPTER_BYTES)
    return config.gpu_adapter_bytes


def kv_cache_bytes(config: EngineConfig, architecture: Architecture) -> int:
    """Memory for keys and values: ``kv_cache_bytes``, but no more than every sequence can use at full length.

    Where it is not given it is the default on a CPU.

    Raises:
        FieldInvalidError: it is too small for a block.
    """
    block_bytes = architecture.kv_bytes_per_token(config.kv_cache_dtype) * config.block_size
    asked = DEFAULT_KV_CACHE_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
    if asked < block_bytes:
        raise FieldInvalidError("engine.kv_cache_bytes", f"must be at least one block of {block_bytes} bytes")
    most = config.max_num_sequences * -(-architecture.max_context_length // config.block_size)
    return min(asked, most * block_bytes)
