"""Writes docs/openapi.json, the description of the HTTP port, from the calls as they are declared.

With ``--check`` it writes nothing, shows how the file differs from what it would be, and exits 1 if it does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from generated_file import write_or_check
from manyhats.server.http.app import operations
from manyhats.server.http.openapi import document
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.gate import Gate

FILE = Path(__file__).resolve().parents[1] / "docs/openapi.json"


def described() -> str:
    """The document; it needs no backend."""
    return document(operations(Gate(heartbeat_limit_s=5.0), Metrics(max_task_labels=1))).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check; returns the exit code."""
    return write_or_check(FILE, described(), "write_openapi.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
