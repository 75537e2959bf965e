"""``manyhats info``: what runs at the other end."""

from __future__ import annotations

from manyhats.cli import options as opt
from manyhats.cli.connection import Connection, connect, takes_connection
from manyhats.cli.output import print_fields, print_json

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
        }
    )
