"""The real backend: model, store and engine, built from the settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

import structlog
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import StoreConfigError, StoreMissingError
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.backends.open import report_gpu
from manyhats.engine.backends.report import GpuReport
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.config import resolve
from manyhats.engine.home import default_home
from manyhats.engine.opening import open_engine
from manyhats.engine.progress import Progress
from manyhats.engine.threads.apart import in_thread
from manyhats.engine.threads.background import background_threads
from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.backend import Backend, ModelInfo, ServerLimits
from manyhats.server.service.store_health import StoreHealth, StoreUse
from manyhats.server.service.task_tokenizers import TaskTokenizers
from manyhats.server.service.text_threads import TextThreads
from manyhats.settings.declaration import values_of

T = TypeVar("T")

_log = structlog.get_logger(__name__)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Registrations wait for each other, and for slow sources.
_NUM_STORE_THREADS = 32
# Each of them waits for a separate process.
_NUM_READING_THREADS = 2
_NUM_RENDERING_THREADS = 2
# The store's name of a setting → the server's.
_STORE_SETTINGS = {"catalogue_url": "catalogue", "url_prefixes": "adapter_url_prefixes"}


def open_backend(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
    """Load the model and open the store; takes seconds, so it runs in a worker thread.

    Raises:
        ConfigError: a setting needs a feature this version lacks.
        EngineError: the model cannot be loaded.
        AdapterError: the store cannot be opened.
    """
    device = resolve_device(config.device)
    settings = resolve(config.engine)
    model = load_model(
        config.model,
        quantization=config.quantization,
        dtype=_DTYPES[settings.dtype],
        names=config.base_names,
        max_context_length=config.max_context_length,
        progress=progress,
    )
    store = open_adapter_store(config, model.description)
    health = StoreHealth()
    loader = AdapterLoader(store, health, metrics)
    engine = open_engine(
        model,
        settings,
        loader,
        fetch=(lambda record: read_from(store.fetch, record, health)) if store.is_far else None,
        device=device,
        progress=progress,
    )
    engine.loop.on_step = metrics.step
    engine.grammars.on_compile = metrics.constraint_compiled
    return Backend(
        engine=engine,
        store=store,
        store_health=health,
        store_threads=background_threads(_NUM_STORE_THREADS, "store"),
        text_threads=TextThreads(
            brief=ThreadPoolExecutor(1, thread_name_prefix="text"), long=background_threads(1, "long-text")
        ),
        tokenizer=model.tokenizer,
        task_tokenizers=TaskTokenizers(
            model.texts,
            lambda record: read_from(store.read_text, record, health),
            reading=background_threads(_NUM_READING_THREADS, "task-files"),
            rendering=background_threads(_NUM_RENDERING_THREADS, "task-text"),
            slow=background_threads(1, "slow-task-text"),
        ),
        info=ModelInfo(
            kind=model.description.kind,
            name=model.name,
            digest=model.description.digest,
            quantization=model.quantization,
            dtype=settings.dtype,
            device=device,
            vocab_size=model.architecture.vocab_size,
            names=model.description.names,
            embedding_size=model.description.read_size,
            pooling=model.description.pooling,
        ),
        limits=limits(config),
    )


def open_adapter_store(
    config: ServeConfig, base: BaseDescription | None, *, only_looks: bool = False
) -> AdapterStore:
    """The store that the settings name, for adapters of ``base``; None for maintenance only.

    Args:
        config: the settings.
        base: the resident base.
        only_looks: neither make a store that is missing nor remove what a crash left.

    Raises:
        ConfigError: its settings are inconsistent.
        StoreMissingError: there is none, and none is to be made.
        AdapterError: it cannot be opened.
    """
    try:
        return open_store(
            config.store,
            base,
            config.adapter_roots,
            catalogue_url=config.catalogue,
            url_prefixes=config.adapter_url_prefixes,
            limits=config.adapter_limits,
            quotas=config.quotas,
            cache_directory=config.store_cache or default_home() / "store-cache",
            cache_max_bytes=config.store_cache_bytes,
            create=not only_looks,
            sweep=not only_looks,
        )
    except StoreMissingError:
        raise
    except StoreConfigError as error:
        setting = _STORE_SETTINGS.get(error.subject, error.subject)
        raise ConfigError(setting, error.description) from error


def limits(config: ServeConfig) -> ServerLimits:
    """What callers are told about the settings."""
    values = values_of(config)
    return ServerLimits(**{each.name: values[each.name] for each in fields(ServerLimits)})


def resolve_device(device: str, find: Callable[[], GpuReport] = report_gpu) -> str:
    """The device that ``auto`` means: the CPU, until what runs on GPUs has been run on one; the log says so.

    Raises:
        ConfigError: ``cuda``, which cannot be used.
    """
    if device == "cpu":
        return device
    gpu = find()
    if device == "cuda" and gpu.problem:
        raise ConfigError("device", gpu.problem)
    if device == "auto":
        untried = f"--device cuda would use {gpu.name}, which has not been tried on a GPU yet"
        _log.info("running on the CPU", reason=gpu.problem or untried)
    return "cuda" if device == "cuda" else "cpu"


@dataclass(frozen=True, slots=True)
class AdapterLoader:
    """Reads an adapter from the store and lowers it for the engine; called on the engine's loader threads."""

    store: AdapterStore
    health: StoreHealth
    metrics: Metrics

    def __call__(self, record: AdapterRecord) -> LoweredAdapter:
        """The adapter as primitives.

        Raises:
            AdapterError: its files are damaged, or cannot be served on this base; or the store hangs.
        """
        begin_s = time.monotonic()
        lowered = read_from(self.store.lower, record, self.health)
        self.metrics.adapter_loaded(time.monotonic() - begin_s)
        return lowered


def read_from(read: Callable[[AdapterRecord], T], record: AdapterRecord, health: StoreHealth) -> T:
    """What is read of a version, unless the store hangs: a thread that does is left to itself.

    Raises:
        AdapterError: it cannot be read, or the store hangs.
    """
    health.check(StoreUse.READ)
    with health.working():
        return health.wait_unless_hanging(in_thread(lambda: read(record), "store-read"), StoreUse.READ)
