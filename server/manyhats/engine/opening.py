"""Opens an engine: builds its parts in order from the model, the settings and an adapter loader."""

from __future__ import annotations

from functools import partial

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.open import open_backend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import EngineConfig, kv_cache_bytes, limits_of, resolve, scheduler_config
from manyhats.engine.engine import Engine
from manyhats.engine.loop.probe import AdapterProbe, probe_prompt
from manyhats.engine.loop.serving import ServingModel
from manyhats.engine.loop.step import Step
from manyhats.engine.loop.streams import Streams
from manyhats.engine.loop.thread import Loop
from manyhats.engine.progress import Progress, no_progress
from manyhats.engine.residency.loading import AdapterLoading, FetchAdapter
from manyhats.engine.residency.residency import AdapterResidency, LoadAdapter
from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.threads.processors import TakenProcessors


def open_engine(
    model: LoadedModel,
    config: EngineConfig,
    load: LoadAdapter,
    *,
    fetch: FetchAdapter | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
    taken: TakenProcessors | None = None,
    progress: Progress = no_progress,
) -> Engine:
    """An engine, ready to be started.

    Args:
        model: the resident base; its weights are packed for the backend here.
        config: limits and sizes.
        load: reads and lowers an artifact; called on loader threads.
        fetch: brings an artifact from afar before it is loaded; None if all are near.
        device: that it runs on: ``cpu`` or ``cuda``.
        backend: runs it; the device's by default.
        taken: counts processors that other processes take; by default as the system reports them.
        progress: called with how many kernels are compiled.

    Raises:
        ModelError: the backend cannot run the model.
        FieldInvalidError: the KV cache is too small for a block.
    """
    config = resolve(config)
    limits = limits_of(config, model.architecture)
    backend = backend or open_backend(
        device,
        dtype=config.dtype,
        num_threads=config.num_threads,
        limits=limits,
        keeps_bits=config.invariance == "strict",
    )
    prepared = backend.prepare(model.architecture, model.weights, progress)
    takes_the_rest = backend.has_own_memory and config.kv_cache_bytes is None
    num_bytes = None if takes_the_rest else kv_cache_bytes(config, model.architecture)
    cache = backend.new_cache(model.architecture, config.block_size, config.kv_cache_dtype, num_bytes)
    capacity = cache.num_blocks * cache.block_size
    probe_slot = config.max_loaded_adapters + 1  # after those of the base model and the loaded adapters
    slots = backend.new_adapters(model.architecture, probe_slot + 1, config.dtype)
    serving = ServingModel(
        base_digest=model.description.digest,
        tokenizer=model.tokenizer,
        eos_token_ids=model.generation.eos_token_ids,
        max_context_length=min(model.architecture.max_context_length, capacity),
        vocab_size=model.architecture.vocab_size,
        sees_all=model.architecture.attention.sees_all,
        padding_id=model.padding_id,
        pooling=model.description.pooling,
    )
    scheduler_limits = scheduler_config(config, model.architecture)
    scheduler = Scheduler(scheduler_limits, BlockAllocator(cache.num_blocks, cache.block_size))
    step = Step(scheduler, prepared, cache, slots, serving.vocab_size)
    warm_up = partial(prepared.warm_up, cache, slots, probe_slot, progress)
    loop = Loop(step, Streams(), backend, taken or TakenProcessors(), warm_up)
    residency = AdapterResidency(
        slots, config.max_loaded_adapters, config.max_adapter_bytes, load, capacity, loop.forget
    )
    probe = AdapterProbe(
        loop,
        slots,
        probe_slot,
        prompt=probe_prompt(model.tokenizer, model.architecture.vocab_size),
        embeddings=model.weights.embedding,
        max_context_length=serving.max_context_length,
        is_encoder=serving.sees_all,
    )
    parts = {**prepared.num_bytes, "kv": cache.num_bytes}
    return Engine(config, serving, loop, AdapterLoading(residency, fetch), probe, parts)
