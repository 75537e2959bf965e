"""The real backend: model, store and engine, put together from the settings."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering import lower
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store import AdapterStore
from manyhats.engine.async_engine import AsyncEngine
from manyhats.engine.config import EngineConfig, resolve
from manyhats.engine.model.loader import load_model
from manyhats.engine.model.progress import Progress
from manyhats.server.config import ServeConfig
from manyhats.server.errors import ConfigError
from manyhats.server.metrics import Metrics
from manyhats.server.ports import Backend, ModelInfo

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def open_backend(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
    """Load the model and open the store; takes seconds, so it runs in a worker thread.

    Raises:
        ConfigError: a setting asks for what this version has not.
        EngineError: the model cannot be loaded.
        AdapterError: the store cannot be opened.
    """
    device = resolve_device(config.device)
    settings = engine_config(config)
    model = load_model(
        config.model,
        quantization=config.quantization,
        dtype=_DTYPES[settings.dtype],
        names=config.base_names,
        max_context_length=config.max_context_length,
        progress=progress,
    )
    limits = AdapterLimits(max_size_bytes=config.max_artifact_bytes, max_rank=config.max_adapter_rank)
    store = AdapterStore(config.store, model.description, config.adapter_roots, limits)
    loader = AdapterLoader(store, model.description, metrics)
    engine = AsyncEngine(model, settings, loader, metrics.step)
    info = ModelInfo(
        name=model.name,
        digest=model.description.digest,
        quantization=config.quantization,
        dtype=settings.dtype,
        device=device,
        vocab_size=model.config.vocab_size,
    )
    return Backend(
        engine=engine, store=store, tokenizer=model.tokenizer, info=info, max_adapters=config.max_adapters
    )


def resolve_device(device: str) -> str:
    """The device that ``auto`` means.

    Raises:
        ConfigError: the engine has no kernels for it.
    """
    if device == "cuda":
        raise ConfigError("device", "this version has kernels for the CPU only")
    return "cpu"


def engine_config(config: ServeConfig) -> EngineConfig:
    """The engine's part of the settings, with nothing left as ``auto``."""
    return resolve(
        EngineConfig(
            dtype=config.dtype,
            kv_cache_dtype=config.kv_cache_dtype,
            kv_cache_bytes=config.kv_cache_bytes,
            max_num_sequences=config.max_sequences,
            max_num_batched_tokens=config.max_batched_tokens,
            max_waiting=config.max_waiting,
            max_loaded_adapters=config.max_adapters,
            max_adapter_bytes=config.adapter_memory_bytes,
            num_threads=config.num_threads,
        )
    )


@dataclass(frozen=True, slots=True)
class AdapterLoader:
    """Reads an adapter from the store and lowers it for the engine; called on the engine's loader threads."""

    store: AdapterStore
    base: BaseDescription
    metrics: Metrics

    def __call__(self, record: AdapterRecord) -> LoweredAdapter:
        """The adapter as primitives.

        Raises:
            AdapterError: its files are damaged, or cannot be served on this base.
        """
        begin_s = time.monotonic()
        lowered = lower(self.store.load(record), self.base)
        self.metrics.adapter_loaded(time.monotonic() - begin_s)
        return lowered
