"""A server's settings: one frozen dataclass, checked when made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.adapters.limits import DEFAULT_CACHE_BYTES, AdapterLimits, Quotas
from manyhats.adapters.taskid import check_task_id
from manyhats.engine.config import EngineConfig
from manyhats.engine.home import default_home
from manyhats.server.access.addresses import is_loopback
from manyhats.server.access.errors import ConfigError
from manyhats.settings.declaration import grouped, setting
from manyhats.settings.reading import Wording, check

if TYPE_CHECKING:
    from manyhats.server.access.tls import TlsFiles

DEFAULT_MODEL = "smollm2-135m-instruct"

WORDING = Wording(
    error=ConfigError,
    shows_value=True,
    words={
        "Input should be": "must be",
        "a valid tuple": "a list",
        "a valid dictionary": "a mapping",
        "a valid": "a",
        "a integer": "a whole number",
    },
)

_GROUPS = (
    _MODEL := "Model",
    _ADAPTERS := "Adapters",
    "What the store accepts",
    _ADDRESS := "Addresses",
    _SECURITY := "Access",
    _LIMITS := "Limits",
    _LOGS := "Settings file and logs",
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")
_HALF_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?!/)")
_URL_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+/")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_PORT: Mapping[str, Any] = {
    "at_least": 0,
    "at_most": 65535,
    "must": "must be in [0, 65535]",
    "metavar": "PORT",
    "group": _ADDRESS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of one server process; the engine's and the store's are sections.

    Raises:
        ConfigError: a setting is out of range; names it.
    """

    model: str = setting(
        DEFAULT_MODEL,
        group=_MODEL,
        metavar="DIR|ID|ALIAS",
        help="The base model: a Hugging Face directory, a hub id, or a known model's name.",
    )
    quantization: Literal["auto", "nf4", "none"] = setting(
        "auto",
        group=_MODEL,
        help="How the base's linears are stored; auto is nf4 where they have 100 million parameters or more.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", group=_MODEL, help="The device to run on.")
    base_names: tuple[str, ...] = setting(
        (),
        group=_MODEL,
        flag="base_name",
        metavar="NAME",
        help="Another name adapters may give for this base. Repeatable.",
    )
    store: str | Path = setting(
        factory=lambda: default_home() / "store",
        group=_ADAPTERS,
        metavar="DIR|URL",
        shown="store in the cache's home",
        help="Where adapters are kept: a directory, created if missing, or a URL such as s3://bucket/manyhats."
        " Several servers may share it.",
    )
    catalogue: str = setting(
        "",
        group=_ADAPTERS,
        metavar="URL",
        shown="a file in the store's directory",
        help="The database of tasks and versions, such as postgresql+psycopg://host/name.",
    )
    store_cache: Path | None = setting(
        None,
        group=_ADAPTERS,
        metavar="DIR",
        shown="in the cache's home",
        help="A directory for local copies of the store at a URL.",
    )
    store_cache_bytes: int = setting(
        DEFAULT_CACHE_BYTES,
        unit="bytes",
        at_least=1,
        group=_ADAPTERS,
        help="Size limit of those copies.",
    )
    store_poll_s: float = setting(
        0.5,
        unit="seconds",
        above=0,
        group=_ADAPTERS,
        help="How often to check for other servers' changes to the store.",
    )
    adapter_roots: tuple[Path, ...] = setting(
        (),
        group=_ADAPTERS,
        flag="adapter_root",
        metavar="DIR",
        help="Adapters may be registered from here. Repeatable.",
    )
    adapter_url_prefixes: tuple[str, ...] = setting(
        (),
        group=_ADAPTERS,
        flag="adapter_url_prefix",
        metavar="URL",
        help="Adapters may be registered from URLs with this prefix, such as s3://bucket/tasks/. Repeatable.",
    )
    register: Mapping[str, str] = setting(
        factory=lambda: MappingProxyType({}),
        group=_ADAPTERS,
        metavar="TASK=PATH",
        help="Register this adapter at start. Repeatable.",
    )
    host: str = setting(
        "127.0.0.1", group=_ADDRESS, metavar="ADDRESS", help="The address that all ports listen on."
    )
    grpc_port: int = setting(50051, **_PORT, help="Port of the gRPC API; 0 for any free one.")
    http_port: int = setting(
        8000, **_PORT, help="Port of OpenAI's API, /metrics, /healthz and /readyz; 0 for any free one."
    )
    page: bool = setting(True, group=_ADDRESS, help="Serve a page for people at the root of the HTTP port.")
    metrics_port: int | None = setting(
        None,
        **_PORT,
        shown="none",
        help="Another port for /metrics, /healthz and /readyz, answered by a thread of its own.",
    )
    tls_cert: Path | None = setting(
        None,
        group=_SECURITY,
        metavar="FILE",
        help="PEM certificate of all ports; reloaded when it changes.",
    )
    tls_key: Path | None = setting(None, group=_SECURITY, metavar="FILE", help="PEM key of the certificate.")
    tls_client_ca: Path | None = setting(
        None,
        group=_SECURITY,
        metavar="FILE",
        help="Mutual TLS: callers need a certificate from these authorities.",
    )
    token_file: Path | None = setting(
        None,
        group=_SECURITY,
        metavar="FILE",
        help="Callers need a token from this file (manyhats token new).",
    )
    http_insecure: bool = setting(
        False, group=_SECURITY, help="With --tls-cert: serve the HTTP port without TLS anyway."
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        group=_SECURITY,
        flag="cors_origin",
        metavar="ORIGIN",
        help="Pages from here may call the HTTP API, as in https://example.org. Repeatable.",
    )
    insecure: bool = setting(
        False, group=_SECURITY, help="Let other machines connect without --tls-cert or --token-file."
    )
    max_context_length: int | None = setting(
        None,
        at_least=1,
        group=_LIMITS,
        shown="the model's own",
        help="Prompt and answer together, in tokens.",
    )
    max_task_labels: int = setting(
        256,
        at_least=0,
        must="must be 0 or more",
        group=_LIMITS,
        help="Number of tasks with separate metrics.",
    )
    openai_lenient: bool = setting(
        False,
        group=_LIMITS,
        help="Ignore unknown fields of HTTP requests, with a line in the log, instead of refusing them.",
    )
    drain_limit_s: float = setting(
        30.0,
        unit="seconds",
        above=0,
        group=_LIMITS,
        help="How long running requests may continue at shutdown.",
    )
    heartbeat_limit_s: float = setting(
        4.0,
        unit="seconds",
        above=0,
        group=_LIMITS,
        help="An engine that hangs for longer counts as unhealthy; one that computes, after fifteen times as long.",
    )
    hang_limit_s: float = setting(
        30.0,
        unit="seconds",
        above=0,
        group=_LIMITS,
        help="After so long it ends the process, likewise.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", group=_LOGS, help="Lowest level that is logged."
    )
    log_format: Literal["json", "text"] = setting(
        "text", group=_LOGS, help="Format of the logs on stderr, and of the ready line on stdout."
    )
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapter_limits: AdapterLimits = field(default_factory=AdapterLimits)
    quotas: Quotas = field(default_factory=Quotas)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", "must name a model: an alias, a directory or a hub id")
        check(self, WORDING)
        self._check_ports()
        self._check_store()
        self._check_tls()
        self._check_host()
        self._check_register()

    def _check_ports(self) -> None:
        if self.grpc_port == self.http_port != 0:
            raise ConfigError("http_port", f"must not be the gRPC port, {self.grpc_port}")
        if self.metrics_port and self.metrics_port in (self.grpc_port, self.http_port):
            raise ConfigError("metrics_port", f"must not be another port's, {self.metrics_port}")
        for origin in self.cors_origins:
            if origin == "*" and self.token_file is not None:
                raise ConfigError("cors_origins", "must name the pages' origins where tokens are needed")
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors_origins", f"{origin!r} must be an origin, as in https://example.org, or *"
                )

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

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files of TLS, if it is on."""
        from manyhats.server.access.tls import TlsFiles

        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ConfigError(missing, "certificate and key must be given together")
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


SETTINGS = grouped(ServeConfig, _GROUPS)
"""The settings of a server; those shown together follow each other."""
