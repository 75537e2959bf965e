"""``manyhats serve``: the server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from manyhats.cli import serve_options as opt
from manyhats.cli.extras import needs_extra, quiet_libraries
from manyhats.cli.failures import UsageError
from manyhats.cli.pairs import as_mapping
from manyhats.cli.progress import shown_progress

if TYPE_CHECKING:
    from manyhats.engine.progress import Progress
    from manyhats.server.errors import ConfigError

HELP = """Serve one base model and any number of tasks on it, over gRPC.

[bold]Examples[/bold]

  $ manyhats serve --model smollm2-135m-instruct \\
    --store ./store --adapter-root ./tasks

  $ manyhats serve --config server.yaml --register sql=./tasks/sql

  $ manyhats serve --store s3://bucket/manyhats \\
    --catalogue postgresql+psycopg://db/manyhats

The first start gets the model and quantizes it; later ones take it from
the cache. When the line "ready" comes on stdout, requests are served.
Ctrl-C lets running requests finish, a second Ctrl-C ends them; before
that line comes it ends the start at once.
"""

# Settings with several values, whose flags, repeatable, are in the singular.
_SINGULAR = {
    "adapter_roots": "adapter_root",
    "adapter_url_prefixes": "adapter_url_prefix",
    "base_names": "base_name",
}


def serve(
    model: opt.Model = None,
    quantization: opt.Quantization = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    base_names: opt.BaseNames = None,
    store: opt.Store = None,
    catalogue: opt.Catalogue = None,
    store_cache: opt.StoreCache = None,
    store_cache_bytes: opt.StoreCacheBytes = None,
    store_poll_s: opt.StorePollS = None,
    adapter_roots: opt.AdapterRoots = None,
    adapter_url_prefixes: opt.AdapterUrlPrefixes = None,
    register: opt.Register = None,
    max_artifact_bytes: opt.MaxArtifactBytes = None,
    max_adapter_rank: opt.MaxAdapterRank = None,
    max_virtual_tokens: opt.MaxVirtualTokens = None,
    max_parts: opt.MaxParts = None,
    max_tasks: opt.MaxTasks = None,
    max_versions_per_task: opt.MaxVersionsPerTask = None,
    max_bytes_per_task: opt.MaxBytesPerTask = None,
    max_bytes: opt.MaxBytes = None,
    max_transfers: opt.MaxTransfers = None,
    host: opt.Host = None,
    grpc_port: opt.GrpcPort = None,
    http_port: opt.HttpPort = None,
    tls_cert: opt.TlsCert = None,
    tls_key: opt.TlsKey = None,
    tls_client_ca: opt.TlsClientCa = None,
    token_file: opt.TokenFile = None,
    http_insecure: opt.HttpInsecure = False,
    insecure: opt.Insecure = False,
    max_context_length: opt.MaxContextLength = None,
    max_sequences: opt.MaxSequences = None,
    max_batched_tokens: opt.MaxBatchedTokens = None,
    kv_cache_bytes: opt.KvCacheBytes = None,
    kv_cache_dtype: opt.KvCacheDtype = None,
    max_adapters: opt.MaxAdapters = None,
    max_waiting: opt.MaxWaiting = None,
    max_bulk_tokens: opt.MaxBulkTokens = None,
    max_score_tokens: opt.MaxScoreTokens = None,
    num_threads: opt.NumThreads = None,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = None,
    log_format: opt.LogFormat = None,
) -> None:
    """Serve one base model and any number of tasks on it, over gRPC."""
    flags = {
        "model": model,
        "quantization": quantization,
        "dtype": dtype,
        "device": device,
        "base_names": base_names,
        "store": store,
        "catalogue": catalogue,
        "store_cache": store_cache,
        "store_cache_bytes": store_cache_bytes,
        "store_poll_s": store_poll_s,
        "adapter_roots": adapter_roots,
        "adapter_url_prefixes": adapter_url_prefixes,
        "max_artifact_bytes": max_artifact_bytes,
        "max_adapter_rank": max_adapter_rank,
        "max_virtual_tokens": max_virtual_tokens,
        "max_parts": max_parts,
        "max_tasks": max_tasks,
        "max_versions_per_task": max_versions_per_task,
        "max_bytes_per_task": max_bytes_per_task,
        "max_bytes": max_bytes,
        "max_transfers": max_transfers,
        "register": parse_register(register or []),
        "host": host,
        "grpc_port": grpc_port,
        "http_port": http_port,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "token_file": token_file,
        "http_insecure": http_insecure or None,
        "insecure": insecure or None,
        "max_context_length": max_context_length,
        "max_sequences": max_sequences,
        "max_batched_tokens": max_batched_tokens,
        "kv_cache_bytes": kv_cache_bytes,
        "kv_cache_dtype": kv_cache_dtype,
        "max_adapters": max_adapters,
        "max_waiting": max_waiting,
        "max_bulk_tokens": max_bulk_tokens,
        "max_score_tokens": max_score_tokens,
        "num_threads": num_threads,
        "log_level": log_level,
        "log_format": log_format,
    }
    raise typer.Exit(run(flags, config))


def run(flags: Mapping[str, Any], file: Path | None) -> int:
    """Serve until a signal, and return the exit code; a flag that is None or empty is not given.

    Raises:
        UsageError: the server's packages are missing, or a setting is wrong.
    """
    with needs_extra("server"):
        from manyhats.engine.threads.openmp import sleep_soon

        sleep_soon()
        from manyhats.server.errors import ConfigError
        from manyhats.server.lifetime.config_file import check_names, make_config, read_file
        from manyhats.server.lifetime.process import EXIT_BY_SIGNAL
        from manyhats.server.lifetime.process import serve as serve_process
        from manyhats.server.lifetime.registered_sources import check_registered_sources
    in_file: dict[str, Any] = {}
    try:
        if file is not None:
            in_file = read_file(file)
            check_names(file, in_file, _SINGULAR.values())
            if "register" in in_file:
                in_file["register"] = register_of_file(file, in_file["register"])
        given = {name: value for name, value in flags.items() if value not in (None, [], {})}
        config = make_config({**with_plurals(in_file), **given})
        check_registered_sources(config)
    except ConfigError as error:
        raise UsageError(_where_given(error, flags, file, in_file)) from error
    quiet_libraries()
    has_bars = sys.stderr.isatty() and config.log_format == "text"
    code = asyncio.run(serve_process(config, show_progress=_bars if has_bars else None))
    if code > EXIT_BY_SIGNAL:
        # Threads that load or compile may still run, and are not waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _bars() -> AbstractContextManager[Progress]:
    """Progress bars, in place of the log's lines of progress."""
    logging.getLogger("manyhats.loading").setLevel(logging.WARNING)
    return shown_progress()


def _where_given(
    error: ConfigError, flags: Mapping[str, Any], file: Path | None, in_file: Mapping[str, Any]
) -> str:
    """What is wrong with a setting, by the file or flag that gives it."""
    name = error.setting.partition(".")[0]
    if name in with_plurals(in_file) and not flags.get(name):
        key = _SINGULAR[name] if _SINGULAR.get(name) in in_file else name
        return f"{file}: {key}{str(error).removeprefix(name)}"
    flag = _SINGULAR.get(error.setting, error.setting).replace("_", "-")
    return f"--{flag}: {str(error).removeprefix(f'{error.setting}: ')}"


def with_plurals(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file, which may have the names of the flags, under the names of ``ServeConfig``."""
    plural = {singular: name for name, singular in _SINGULAR.items()}
    return {plural.get(name, name): value for name, value in settings.items()}


def register_of_file(file: Path, value: object) -> dict[str, str]:
    """A settings file's ``register``: a mapping of tasks to paths, or a list of ``TASK=PATH`` as the flag takes.

    Raises:
        UsageError: it is neither, or a task comes twice; names the file.
    """
    if isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return parse_register(value, f"{file}: register")
    raise UsageError(
        f"{file}: register: must be a list of TASK=PATH, or a mapping such as {{sql: ./tasks/sql}}"
    )


def parse_register(texts: list[str], name: str = "--register") -> dict[str, str]:
    """``TASK=PATH`` texts as a mapping.

    Raises:
        UsageError: one is not of that form, or a task comes twice; says ``name``.
    """
    return as_mapping(name, "TASK=PATH", (text.partition("=") for text in texts))
