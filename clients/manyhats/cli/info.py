"""``manyhats info``: what the server is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.terminal.output import print_fields, print_json

if TYPE_CHECKING:
    from manyhats.client import ServerInfo, ServerLimits

HELP = """Show a server's version, base model and limits.

[bold]Examples[/bold]

  $ manyhats info

  $ manyhats info --server 10.0.0.7:50051 --json
"""


@takes_connection
def info(*, connection: Connection, as_json: opt.Json = False) -> None:
    """Show a server's version, base model and limits."""
    with connect(connection) as client:
        found = client.server_info()
    if as_json:
        print_json(found)
        return
    print_fields(
        {
            "server": f"{connection.server}, version {found.version}",
            "base model": found.base_model,
            "base digest": found.base_digest,
            "quantization": found.quantization,
            "dtype": found.dtype,
            "device": found.device,
            "context": f"{found.max_context_length} tokens",
            "vocabulary": f"{found.vocab_size} tokens",
            "attention": found.attention,
            "embeddings": _embeddings(found),
            **({} if found.limits is None else _limits(found.limits)),
        }
    )


def _embeddings(found: ServerInfo) -> str:
    """Nothing if the server is too old to say."""
    return f"{found.embedding_size} values, pooling {found.default_pooling}" if found.embedding_size else ""


def _limits(limits: ServerLimits) -> dict[str, str]:
    """A line for each subject; anything without a bound is left out."""
    store = {
        "tasks": _count(limits.max_tasks),
        "versions per task": _count(limits.max_versions_per_task),
        "per task": _bytes(limits.max_bytes_per_task),
        "in total": _bytes(limits.max_bytes),
    }
    return {
        "requests": f"{limits.max_sequences} run at once, {limits.max_waiting} wait,"
        f" with at most {limits.max_continuations} continuations;"
        f" no message may exceed {_bytes(limits.max_request_bytes)}",
        "adapters": f"{limits.max_adapters} run at once, each of up to {_bytes(limits.max_artifact_bytes)},"
        f" rank {limits.max_adapter_rank}, {limits.max_virtual_tokens} virtual tokens, {limits.max_parts} parts",
        "transfers": f"{limits.max_transfers} at a time",
        "store": ", ".join(f"{name}: {bound}" for name, bound in store.items() if bound),
    }


def _count(bound: int | None) -> str:
    return "" if bound is None else str(bound)


def _bytes(bound: int | None) -> str:
    """In the units that the server's flags take."""
    if bound is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if bound >= size:
            return f"{bound / size:.4g} {unit}"
    return f"{bound} B"
