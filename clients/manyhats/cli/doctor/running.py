"""A running server, as a caller, a probe and a scraper see it."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import manyhats
from manyhats.cli.options.connection import Connection, connect
from manyhats.cli.terminal.failures import CommandError
from manyhats.server.doctor.finding import Finding, failure, ok, warning

if TYPE_CHECKING:
    from manyhats.client import AdapterInfo, Client
    from manyhats.server.lifetime.config import ServeConfig

_READY_S = 5.0
"""What a server that runs, and is not starting, needs at most."""
_TEXT = "Hello"
_OWN_SERIES = b"\nmanyhats_"


def look_at_server(connection: Connection, config: ServeConfig) -> Iterator[Finding]:
    """Whether it is ready, of this version, takes the token, answers a task, and shows metrics."""
    try:
        with connect(connection) as client:
            client.wait_ready(timeout_s=min(connection.timeout or _READY_S, _READY_S))
            yield ok("server", f"{connection.server} is ready")
            yield from _look_at_version(client, connection)
            yield from _look_at_task(client)
    except CommandError as error:
        yield failure("server", error.format_message(), "see its log, --server, --tls-ca and --token")
        return
    yield from _look_at_metrics(connection, config)


def _look_at_version(client: Client, connection: Connection) -> Iterator[Finding]:
    info = client.server_info()
    yield ok("token", "taken" if connection.token else "none is needed")
    if info.version == manyhats.__version__:
        yield ok("version", info.version)
    else:
        text = f"the server's is {info.version}, this one's {manyhats.__version__}"
        yield warning("version", text, "what is said here of settings may not hold there: use its own doctor")


def _look_at_task(client: Client) -> Iterator[Finding]:
    """One call on an active task, or on the base model if there is none that the token may use."""
    from manyhats.client import PermissionDeniedError

    active = next((each for each in client.list_adapters() if each.state == "active"), None)
    name = "the base model" if active is None else f"{active.task_id}@{active.version}"
    try:
        _call(client, active)
    except PermissionDeniedError as error:
        yield warning("task", f"{name} was not tried: {error}", "give a token with the role generate")
    else:
        yield ok("task", f"{name} answers")


def _call(client: Client, active: AdapterInfo | None) -> None:
    task_id = "" if active is None else active.task_id
    match active.kind if active is not None else "":
        case "generate":
            client.generate(_TEXT, task_id=task_id, max_new_tokens=1)
        case "classify":
            client.classify([_TEXT], task_id=task_id)
        case "classify_tokens":
            client.tag([_TEXT], task_id=task_id)
        case _:
            client.embed([_TEXT], task_id=task_id, pooling="mean")


def _look_at_metrics(connection: Connection, config: ServeConfig) -> Iterator[Finding]:
    """The probe and the metrics of the HTTP port that the settings name, on the server's host."""
    is_encrypted = connection.credentials().uses_tls and not config.http_insecure
    host = connection.server.rpartition(":")[0]
    base = f"{'https' if is_encrypted else 'http'}://{host}:{config.http_port}"
    advice = "give the --http-port and --http-insecure of that server; see its log"
    context = ssl.create_default_context(cafile=connection.tls_ca) if is_encrypted else None
    try:
        _get(f"{base}/readyz", connection, context)
        content = _get(f"{base}/metrics", connection, context)
    except (OSError, urllib.error.URLError) as error:
        yield failure("metrics", f"{base}: {error}", advice)
        return
    if _OWN_SERIES not in content:
        yield failure("metrics", f"{base}/metrics has none of manyhats", advice)
    else:
        num_series = sum(not line.startswith(b"#") for line in content.splitlines())
        yield ok("metrics", f"{base}/metrics: {num_series} series, {len(content) // 1000} kB")


def _get(url: str, connection: Connection, context: ssl.SSLContext | None) -> bytes:
    with urllib.request.urlopen(url, timeout=connection.timeout, context=context) as answer:
        return bytes(answer.read())
