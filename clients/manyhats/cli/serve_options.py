"""The flags of ``manyhats serve``, each with its help; the defaults shown are those of ``ServeConfig``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer


def _model(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Model", **settings)


def _adapters(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Adapters", **settings)


def _bound(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="What the store takes", **settings)


def _address(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Where it listens", **settings)


def _security(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Who is let in", **settings)


def _limit(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Limits", **settings)


def _log(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Settings file and logs", **settings)


Model: TypeAlias = Annotated[
    str | None,
    _model(
        "--model",
        metavar="DIR|ID|ALIAS",
        help="The base model: a Hugging Face directory, a hub id, or a known model's name.",
        show_default="smollm2-135m-instruct",
    ),
]
Quantization: TypeAlias = Annotated[
    str | None,
    _model(
        "--quantization", metavar="nf4|none", help="How the base's linears are stored.", show_default="nf4"
    ),
]
Dtype: TypeAlias = Annotated[
    str | None,
    _model(
        "--dtype",
        metavar="auto|bfloat16|float32",
        help="The number format to compute in.",
        show_default="auto",
    ),
]
Device: TypeAlias = Annotated[
    str | None, _model("--device", metavar="auto|cpu|cuda", help="The device to run on.", show_default="auto")
]
BaseNames: TypeAlias = Annotated[
    list[str] | None,
    _model("--base-name", metavar="NAME", help="Another name adapters may give for this base. Repeatable."),
]

Store: TypeAlias = Annotated[
    str | None,
    _adapters(
        "--store",
        metavar="DIR|URL",
        help="Keeps registered adapters: a directory, made if missing, or a URL such as s3://bucket/manyhats."
        " Several servers may share it.",
        show_default="store in the cache's home",
    ),
]
Catalogue: TypeAlias = Annotated[
    str | None,
    _adapters(
        "--catalogue",
        metavar="URL",
        help="The database of tasks and versions, such as postgresql+psycopg://host/name.",
        show_default="a file in the store's directory",
    ),
]
StoreCache: TypeAlias = Annotated[
    Path | None,
    _adapters(
        "--store-cache",
        metavar="DIR",
        help="Keeps copies of what lies at the store's URL.",
        show_default="in the cache's home",
    ),
]
StoreCacheBytes: TypeAlias = Annotated[
    str | None,
    _adapters(
        "--store-cache-bytes",
        metavar="SIZE",
        help="The most that those copies may take.",
        show_default="8GiB",
    ),
]
StorePollS: TypeAlias = Annotated[
    float | None,
    _adapters(
        "--store-poll-s",
        metavar="SECONDS",
        help="How often to look at what other servers changed in the store.",
        show_default="0.5",
    ),
]
AdapterRoots: TypeAlias = Annotated[
    list[Path] | None,
    _adapters("--adapter-root", metavar="DIR", help="Adapters may be registered from here. Repeatable."),
]
AdapterUrlPrefixes: TypeAlias = Annotated[
    list[str] | None,
    _adapters(
        "--adapter-url-prefix",
        metavar="URL",
        help="Adapters may be registered from URLs that begin so, such as s3://bucket/tasks/. Repeatable.",
    ),
]
Register: TypeAlias = Annotated[
    list[str] | None,
    _adapters("--register", metavar="TASK=PATH", help="Register this adapter at start. Repeatable."),
]
MaxArtifactBytes: TypeAlias = Annotated[
    str | None,
    _bound(
        "--max-artifact-bytes",
        metavar="SIZE",
        help="All files of one adapter.",
        show_default="1GiB",
    ),
]
MaxAdapterRank: TypeAlias = Annotated[
    int | None,
    _bound("--max-adapter-rank", metavar="R", min=1, help="Rank of a low-rank delta.", show_default="256"),
]
MaxVirtualTokens: TypeAlias = Annotated[
    int | None,
    _bound(
        "--max-virtual-tokens",
        metavar="P",
        min=1,
        help="Virtual tokens of a prefix or a soft prompt.",
        show_default="4096",
    ),
]
MaxParts: TypeAlias = Annotated[
    int | None,
    _bound("--max-parts", metavar="N", min=1, help="Adapters in a composed task.", show_default="16"),
]
MaxTasks: TypeAlias = Annotated[
    int | None,
    _bound("--max-tasks", metavar="N", min=1, help="Tasks that the store may hold.", show_default="no bound"),
]
MaxVersionsPerTask: TypeAlias = Annotated[
    int | None,
    _bound(
        "--max-versions-per-task",
        metavar="N",
        min=1,
        help="Versions of a task at a time.",
        show_default="no bound",
    ),
]
MaxBytesPerTask: TypeAlias = Annotated[
    str | None,
    _bound(
        "--max-bytes-per-task",
        metavar="SIZE",
        help="All versions of a task together.",
        show_default="no bound",
    ),
]
MaxBytes: TypeAlias = Annotated[
    str | None,
    _bound(
        "--max-bytes",
        metavar="SIZE",
        help="All versions of all tasks together.",
        show_default="no bound",
    ),
]
MaxTransfers: TypeAlias = Annotated[
    int | None,
    _bound(
        "--max-transfers",
        metavar="N",
        min=1,
        help="Uploads, and downloads of adapters, at a time.",
        show_default="16",
    ),
]

Host: TypeAlias = Annotated[
    str | None,
    _address(
        "--host", metavar="ADDRESS", help="The address that both ports listen on.", show_default="127.0.0.1"
    ),
]
GrpcPort: TypeAlias = Annotated[
    int | None,
    _address(
        "--grpc-port",
        metavar="PORT",
        min=0,
        max=65535,
        help="For the API; 0 takes a free one.",
        show_default="50051",
    ),
]
HttpPort: TypeAlias = Annotated[
    int | None,
    _address(
        "--http-port",
        metavar="PORT",
        min=0,
        max=65535,
        help="For /metrics, /healthz and /readyz; 0 takes a free one.",
        show_default="8000",
    ),
]
Insecure: TypeAlias = Annotated[
    bool, _security("--insecure", help="Let other machines in without --tls-cert or --token-file.")
]
TlsCert: TypeAlias = Annotated[
    Path | None,
    _security("--tls-cert", metavar="FILE", help="PEM certificate of both ports; reloaded when it changes."),
]
TlsKey: TypeAlias = Annotated[
    Path | None, _security("--tls-key", metavar="FILE", help="PEM key of the certificate.")
]
TlsClientCa: TypeAlias = Annotated[
    Path | None,
    _security(
        "--tls-client-ca", metavar="FILE", help="Mutual TLS: callers need a certificate of these authorities."
    ),
]
TokenFile: TypeAlias = Annotated[
    Path | None,
    _security("--token-file", metavar="FILE", help="Callers need a token of this file (manyhats token new)."),
]
HttpInsecure: TypeAlias = Annotated[
    bool, _security("--http-insecure", help="With --tls-cert: the HTTP port in the clear all the same.")
]

MaxContextLength: TypeAlias = Annotated[
    int | None,
    _limit(
        "--max-context-length",
        metavar="N",
        min=1,
        help="Prompt and answer together, in tokens.",
        show_default="the model's own",
    ),
]
MaxSequences: TypeAlias = Annotated[
    int | None,
    _limit("--max-sequences", metavar="N", min=1, help="Sequences that run at once.", show_default="64"),
]
MaxBatchedTokens: TypeAlias = Annotated[
    int | None,
    _limit("--max-batched-tokens", metavar="N", min=1, help="Tokens of one step.", show_default="256"),
]
KvCacheBytes: TypeAlias = Annotated[
    str | None,
    _limit(
        "--kv-cache-bytes",
        metavar="SIZE",
        help="Memory for the KV cache.",
        show_default="1GiB",
    ),
]
KvCacheDtype: TypeAlias = Annotated[
    str | None,
    _limit(
        "--kv-cache-dtype",
        metavar="auto|bfloat16|float32",
        help="The number format of the KV cache; auto is --dtype.",
        show_default="auto",
    ),
]
MaxAdapters: TypeAlias = Annotated[
    int | None,
    _limit("--max-adapters", metavar="N", min=1, help="Adapters in memory at once.", show_default="256"),
]
MaxWaiting: TypeAlias = Annotated[
    int | None,
    _limit("--max-waiting", metavar="N", min=1, help="Requests that may wait.", show_default="1024"),
]
MaxBulkTokens: TypeAlias = Annotated[
    int | None,
    _limit(
        "--max-bulk-tokens",
        metavar="N",
        min=1,
        help="Tokens of scorings and long prompts in a step beside other requests.",
        show_default="8",
    ),
]
MaxScoreTokens: TypeAlias = Annotated[
    int | None,
    _limit(
        "--max-score-tokens",
        metavar="N",
        min=1,
        help="Prompt and all continuations of one scoring.",
        show_default="65536",
    ),
]
NumThreads: TypeAlias = Annotated[
    int | None,
    _limit(
        "--num-threads",
        metavar="N",
        min=0,
        help="Threads of the kernels; 0 is one per core.",
        show_default="0",
    ),
]

ConfigFile: TypeAlias = Annotated[
    Path | None,
    _log("--config", metavar="FILE", help="YAML with settings of the same names; flags win."),
]
LogLevel: TypeAlias = Annotated[
    str | None,
    _log(
        "--log-level",
        metavar="debug|info|warning|error",
        help="The least that is logged.",
        show_default="info",
    ),
]
LogFormat: TypeAlias = Annotated[
    str | None,
    _log(
        "--log-format",
        metavar="json|text",
        help="The form of the logs on stderr, and of the ready line on stdout.",
        show_default="text",
    ),
]
