"""The real backend: model, store and engine, put together from the settings."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import StoreConfigError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.quotas import Quotas
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.config import EngineConfig, resolve
from manyhats.engine.engine import AsyncEngine
from manyhats.engine.home import default_home
from manyhats.engine.progress import Progress
from manyhats.engine.threads.background import Background
from manyhats.server.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.backend import Backend, ModelInfo, ServerLimits
from manyhats.server.service.task_tokenizers import TaskTokenizers
from manyhats.server.service.text_threads import TextThreads

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Registrations wait for each other, and for slow sources.
_NUM_STORE_THREADS = 32
# Each of them waits for a process of its own.
_NUM_READING_THREADS = 2
_NUM_RENDERING_THREADS = 2
# What the store calls a setting → what the server calls it.
_STORE_SETTINGS = {"catalogue_url": "catalogue", "url_prefixes": "adapter_url_prefixes"}


def open_backend(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
    """Load the model and open the store; takes seconds, so it runs in a worker thread.

    Raises:
        ConfigError: a setting needs a feature this version lacks.
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
    store = open_adapter_store(config, model.description)
    loader = AdapterLoader(store, metrics)
    background = Background()
    engine = AsyncEngine(model, settings, loader, metrics.step, background, progress)
    info = ModelInfo(
        name=model.name,
        digest=model.description.digest,
        quantization=config.quantization,
        dtype=settings.dtype,
        device=device,
        vocab_size=model.architecture.vocab_size,
    )
    return Backend(
        engine=engine,
        store=store,
        store_threads=background.threads(_NUM_STORE_THREADS, "store"),
        text_threads=TextThreads(
            brief=ThreadPoolExecutor(1, thread_name_prefix="text"), long=background.threads(1, "long-text")
        ),
        tokenizer=model.tokenizer,
        task_tokenizers=TaskTokenizers(
            model.texts,
            store.read_text,
            reading=background.threads(_NUM_READING_THREADS, "task-files"),
            rendering=background.threads(_NUM_RENDERING_THREADS, "task-text"),
            slow=background.threads(1, "slow-task-text"),
        ),
        info=info,
        limits=limits(config),
    )


def open_adapter_store(config: ServeConfig, base: BaseDescription) -> AdapterStore:
    """The store that the settings name, for adapters of ``base``.

    Raises:
        ConfigError: its settings do not go together.
        AdapterError: it cannot be opened.
    """
    try:
        return open_store(
            config.store,
            base,
            config.adapter_roots,
            catalogue_url=config.catalogue,
            url_prefixes=config.adapter_url_prefixes,
            limits=adapter_limits(config),
            quotas=quotas(config),
            cache_directory=config.store_cache or default_home() / "store-cache",
            cache_max_bytes=config.store_cache_bytes,
        )
    except StoreConfigError as error:
        setting = _STORE_SETTINGS.get(error.subject, error.subject)
        raise ConfigError(setting, error.description) from error


def adapter_limits(config: ServeConfig) -> AdapterLimits:
    """How large an adapter may be."""
    return AdapterLimits(
        max_size_bytes=config.max_artifact_bytes,
        max_rank=config.max_adapter_rank,
        max_virtual_tokens=config.max_virtual_tokens,
        max_parts=config.max_parts,
    )


def limits(config: ServeConfig) -> ServerLimits:
    """What callers are told of the settings."""
    return ServerLimits(**{each.name: getattr(config, each.name) for each in fields(ServerLimits)})


def quotas(config: ServeConfig) -> Quotas:
    """How much the store may hold."""
    return Quotas(
        max_tasks=config.max_tasks,
        max_versions_per_task=config.max_versions_per_task,
        max_bytes_per_task=config.max_bytes_per_task,
        max_bytes=config.max_bytes,
        max_transfers=config.max_transfers,
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
            max_bulk_tokens=config.max_bulk_tokens,
            max_score_tokens=config.max_score_tokens,
            max_loaded_adapters=config.max_adapters,
            max_adapter_bytes=config.adapter_memory_bytes,
            unread_limit_s=config.unread_limit_s,
            num_threads=config.num_threads,
        )
    )


@dataclass(frozen=True, slots=True)
class AdapterLoader:
    """Reads an adapter from the store and lowers it for the engine; called on the engine's loader threads."""

    store: AdapterStore
    metrics: Metrics

    def __call__(self, record: AdapterRecord) -> LoweredAdapter:
        """The adapter as primitives.

        Raises:
            AdapterError: its files are damaged, or cannot be served on this base.
        """
        begin_s = time.monotonic()
        lowered = self.store.lower(record)
        self.metrics.adapter_loaded(time.monotonic() - begin_s)
        return lowered
