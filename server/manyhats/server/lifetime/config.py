"""What a server is started with: one frozen dataclass, checked when made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.quotas import Quotas
from manyhats.adapters.store.artifacts.opening import DEFAULT_CACHE_BYTES
from manyhats.adapters.taskid import check_task_id
from manyhats.engine.config import EngineConfig
from manyhats.engine.home import default_home
from manyhats.server.access.addresses import is_loopback
from manyhats.server.access.tls import TlsFiles
from manyhats.server.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float32"]
Quantization = Literal["nf4", "none"]
LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]

DEFAULT_MODEL = "smollm2-135m-instruct"

_ENGINE = EngineConfig()
_LIMITS = AdapterLimits()
_QUOTAS = Quotas()
_POSITIVE = (
    "max_context_length",
    "max_sequences",
    "max_batched_tokens",
    "max_waiting",
    "max_bulk_tokens",
    "max_score_tokens",
    "kv_cache_bytes",
    "max_adapters",
    "adapter_memory_bytes",
    "max_artifact_bytes",
    "max_adapter_rank",
    "max_virtual_tokens",
    "max_parts",
    "max_tasks",
    "max_versions_per_task",
    "max_bytes_per_task",
    "max_bytes",
    "max_transfers",
    "store_cache_bytes",
)
_SECONDS = ("drain_limit_s", "unread_limit_s", "heartbeat_limit_s", "store_poll_s")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")
_HALF_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?!/)")
_URL_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of one server process.

    Attributes:
        model: a known model's alias, a Hugging Face directory, or a hub id.
        store: a directory, made if missing, or a URL such as ``s3://bucket/adapters``; several servers may share it.
        catalogue: URL of the database of tasks and versions; empty is a file in the store's directory.
        store_cache: directory for copies of what lies at a store's URL; None is one in the home.
        store_cache_bytes: of those copies.
        store_poll_s: how often is looked at what other servers changed in the store.
        adapter_roots: directories that adapters may be registered from.
        adapter_url_prefixes: what URLs of adapters may begin with; each ends with a slash.
        register: task id → path or URL of an adapter to register at start, under one of those.
        base_names: more names that adapters may give for this base model.
        host: address of both ports; one that other machines can reach needs ``tls_cert`` and ``token_file``.
        insecure: allow that host without them; what is given of them still holds.
        tls_cert, tls_key: PEM files of both ports; read again when they change.
        tls_client_ca: PEM file; gRPC callers must show a certificate of one of these authorities.
        token_file: who may call what, see ``tokens``; read again when it changes. None lets everybody.
        http_insecure: serve HTTP in the clear although gRPC has TLS.
        grpc_port, http_port: 0 takes any free one.
        device: ``auto`` takes the best there is.
        dtype: of the computation; ``auto`` is bfloat16.
        quantization: of the base model's linears.
        max_context_length: prompt and output together, in tokens; None is the model's own.
        max_sequences: sequences that run at once.
        max_batched_tokens: tokens of one step; a longer prompt takes several.
        max_waiting: requests that may wait; more are refused.
        max_bulk_tokens: tokens of scorings and of prompts that take several steps, in a step beside other requests.
        max_score_tokens: prompt and all continuations of one scoring.
        kv_cache_bytes: memory for keys and values.
        kv_cache_dtype: ``auto`` is ``dtype``.
        num_threads: of the kernels; 0 is one per core.
        max_adapters: adapters that are loaded at once.
        adapter_memory_bytes: memory of the loaded adapters.
        max_artifact_bytes: all files of one adapter together.
        max_adapter_rank: R of any low-rank delta.
        max_virtual_tokens: P of any prefix.
        max_parts: adapters in one composed task.
        max_tasks, max_versions_per_task, max_bytes_per_task, max_bytes: what the store may hold; None is no bound.
        max_transfers: uploads, and downloads of adapters, at a time.
        max_task_labels: tasks with metrics of their own.
        drain_limit_s: how long running requests may go on at shutdown.
        unread_limit_s: an answer of which nothing is read for so long is given up.
        heartbeat_limit_s: an engine silent for longer is not healthy.
        log_level, log_format: of stderr; ``json`` also makes the ready line on stdout JSON.

    Raises:
        ConfigError: a setting is out of its range; it names the setting.
    """

    model: str = DEFAULT_MODEL
    store: str | Path = field(default_factory=lambda: default_home() / "store")
    catalogue: str = ""
    store_cache: Path | None = None
    store_cache_bytes: int = DEFAULT_CACHE_BYTES
    store_poll_s: float = 0.5
    adapter_roots: tuple[Path, ...] = ()
    adapter_url_prefixes: tuple[str, ...] = ()
    register: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    base_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    insecure: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    http_insecure: bool = False
    grpc_port: int = 50051
    http_port: int = 8000
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = "nf4"
    max_context_length: int | None = None
    max_sequences: int = _ENGINE.max_num_sequences
    max_batched_tokens: int = _ENGINE.max_num_batched_tokens
    max_waiting: int = _ENGINE.max_waiting
    max_bulk_tokens: int = _ENGINE.max_bulk_tokens
    max_score_tokens: int = _ENGINE.max_score_tokens
    kv_cache_bytes: int = _ENGINE.kv_cache_bytes
    kv_cache_dtype: Dtype = "auto"
    num_threads: int = 0
    max_adapters: int = _ENGINE.max_loaded_adapters
    adapter_memory_bytes: int = _ENGINE.max_adapter_bytes
    max_artifact_bytes: int = _LIMITS.max_size_bytes
    max_adapter_rank: int = _LIMITS.max_rank
    max_virtual_tokens: int = _LIMITS.max_virtual_tokens
    max_parts: int = _LIMITS.max_parts
    max_tasks: int | None = _QUOTAS.max_tasks
    max_versions_per_task: int | None = _QUOTAS.max_versions_per_task
    max_bytes_per_task: int | None = _QUOTAS.max_bytes_per_task
    max_bytes: int | None = _QUOTAS.max_bytes
    max_transfers: int = _QUOTAS.max_transfers
    max_task_labels: int = 256
    drain_limit_s: float = 30.0
    unread_limit_s: float = _ENGINE.unread_limit_s
    heartbeat_limit_s: float = 60.0
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", "must name a model: an alias, a directory or a hub id")
        self._check_store()
        self._check_choices()
        self._check_numbers()
        self._check_tls()
        self._check_host()
        self._check_register()

    def _check_store(self) -> None:
        if not str(self.store) or _HALF_URL.match(str(self.store)):
            raise ConfigError(
                "store", f"must be a directory or a URL, as in s3://bucket/tasks, not {self.store!r}"
            )
        if self.catalogue and not _URL.fullmatch(self.catalogue):
            raise ConfigError(
                "catalogue", "must be the URL of a database, as in postgresql+psycopg://host/name"
            )
        for prefix in self.adapter_url_prefixes:
            if not _URL_PREFIX.fullmatch(prefix):
                raise ConfigError(
                    "adapter_url_prefixes",
                    f"{prefix!r} must be a URL that ends with a slash, as in s3://bucket/tasks/",
                )

    def _check_choices(self) -> None:
        choices = {
            "device": Device,
            "dtype": Dtype,
            "kv_cache_dtype": Dtype,
            "quantization": Quantization,
            "log_level": LogLevel,
            "log_format": LogFormat,
        }
        for name, kind in choices.items():
            allowed = get_args(kind)
            if getattr(self, name) not in allowed:
                raise ConfigError(name, f"must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        for name in ("grpc_port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(name, f"must be in [0, 65535], not {getattr(self, name)}")
        if self.grpc_port == self.http_port != 0:
            raise ConfigError("http_port", f"must not be the gRPC port, {self.grpc_port}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, f"must be at least 1, not {value}")
        for name in ("max_task_labels", "num_threads"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"must be 0 or more, not {getattr(self, name)}")
        for name in _SECONDS:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(name, f"must be over 0 seconds, not {getattr(self, name)}")

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files of TLS, if it is on."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ConfigError(missing, "certificate and key are given together")
        if self.tls_client_ca is not None and self.tls_files is None:
            raise ConfigError("tls_client_ca", "client certificates need a server certificate and its key")

    def _check_host(self) -> None:
        if not self.host:
            raise ConfigError("host", "must not be empty")
        if is_loopback(self.host) or self.insecure:
            return
        needs = {"--tls-cert and --tls-key": self.tls_files, "--token-file": self.token_file}
        missing = " and ".join(flags for flags, value in needs.items() if value is None)
        if missing:
            raise ConfigError(
                "host",
                f"{self.host} can be reached by other machines, which needs {missing};"
                " or --insecure if the network is trusted",
            )

    def _check_register(self) -> None:
        for task_id, path in self.register.items():
            try:
                check_task_id(task_id)
            except TaskIdInvalidError as error:
                raise ConfigError("register", f"{task_id!r}: {error.description}") from error
            if not path:
                raise ConfigError("register", f"{task_id} needs a path, as in TASK=PATH")
