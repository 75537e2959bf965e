"""What a server is started with: one frozen dataclass, checked when made."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.taskid import check_task_id
from manyhats.engine.config import EngineConfig
from manyhats.engine.model.directories import default_home
from manyhats.server.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float32"]
Quantization = Literal["nf4", "none"]
LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]

DEFAULT_MODEL = "smollm2-135m-instruct"

_ENGINE = EngineConfig()
_LIMITS = AdapterLimits()
_POSITIVE = (
    "max_context_length",
    "max_sequences",
    "max_batched_tokens",
    "max_waiting",
    "kv_cache_bytes",
    "max_adapters",
    "adapter_memory_bytes",
    "max_artifact_bytes",
    "max_adapter_rank",
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of one server process.

    Attributes:
        model: a known model's alias, a Hugging Face directory, or a hub id.
        store: the directory of the adapter store; made if missing.
        adapter_roots: directories that adapters may be registered from.
        register: task id → path of an adapter to register at start, under one of the roots.
        base_names: more names that adapters may give for this base model.
        host: address of both ports; one that other machines can reach needs ``insecure``.
        insecure: serve other machines without encryption and without credentials.
        grpc_port, http_port: 0 takes any free one.
        device: ``auto`` takes the best there is.
        dtype: of the computation; ``auto`` is bfloat16.
        quantization: of the base model's linears.
        max_context_length: prompt and output together, in tokens; None is the model's own.
        max_sequences: sequences that run at once.
        max_batched_tokens: tokens of one step; a longer prompt takes several.
        max_waiting: requests that may wait; more are refused.
        kv_cache_bytes: memory for keys and values.
        kv_cache_dtype: ``auto`` is ``dtype``.
        num_threads: of the kernels; 0 is one per core.
        max_adapters: adapters that are loaded at once.
        adapter_memory_bytes: memory of the loaded adapters.
        max_artifact_bytes: all files of one adapter together.
        max_adapter_rank: R of any low-rank delta.
        max_task_labels: tasks with metrics of their own.
        drain_limit_s: how long running requests may go on at shutdown.
        heartbeat_limit_s: an engine silent for longer is not healthy.
        log_level, log_format: of stderr; ``json`` also makes the ready line on stdout JSON.

    Raises:
        ConfigError: a setting is out of its range; it names the setting.
    """

    model: str = DEFAULT_MODEL
    store: Path = field(default_factory=lambda: default_home() / "store")
    adapter_roots: tuple[Path, ...] = ()
    register: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    base_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    insecure: bool = False
    grpc_port: int = 50051
    http_port: int = 8000
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = "nf4"
    max_context_length: int | None = None
    max_sequences: int = _ENGINE.max_num_sequences
    max_batched_tokens: int = _ENGINE.max_num_batched_tokens
    max_waiting: int = _ENGINE.max_waiting
    kv_cache_bytes: int = _ENGINE.kv_cache_bytes
    kv_cache_dtype: Dtype = "auto"
    num_threads: int = 0
    max_adapters: int = _ENGINE.max_loaded_adapters
    adapter_memory_bytes: int = _ENGINE.max_adapter_bytes
    max_artifact_bytes: int = _LIMITS.max_size_bytes
    max_adapter_rank: int = _LIMITS.max_rank
    max_task_labels: int = 256
    drain_limit_s: float = 30.0
    heartbeat_limit_s: float = 60.0
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", "must name a model: an alias, a directory or a hub id")
        if _URL.match(str(self.store)):
            raise ConfigError("store", f"must be a directory, not {self.store}")
        self._check_choices()
        self._check_numbers()
        self._check_host()
        self._check_register()

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
        for name in ("drain_limit_s", "heartbeat_limit_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(name, f"must be over 0 seconds, not {getattr(self, name)}")

    def _check_host(self) -> None:
        if not self.host:
            raise ConfigError("host", "must not be empty")
        if not is_loopback(self.host) and not self.insecure:
            raise ConfigError(
                "host",
                f"{self.host} can be reached by other machines, and this server has no encryption and no"
                " credentials; add --insecure if the network is trusted",
            )

    def _check_register(self) -> None:
        for task_id, path in self.register.items():
            try:
                check_task_id(task_id)
            except TaskIdInvalidError as error:
                raise ConfigError("register", f"{task_id!r}: {error.description}") from error
            if not path:
                raise ConfigError("register", f"{task_id} needs a path, as in TASK=PATH")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: who can reach it is not known
