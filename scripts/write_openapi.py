"""Writes docs/openapi.json, the description of the HTTP port, from the calls as they are declared.

With ``--check`` it writes nothing, shows how the file differs from what it would be, and exits 1 if it does.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from manyhats.server.http.app import operations
from manyhats.server.http.openapi import document
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.gate import Gate

FILE = Path(__file__).resolve().parents[1] / "docs/openapi.json"


def described() -> bytes:
    """The document; it needs no backend."""
    return document(operations(Gate(heartbeat_limit_s=5.0), Metrics(max_task_labels=1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes the OpenAPI document of the HTTP port.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    wanted = described()
    if not parser.parse_args(arguments).check:
        FILE.write_bytes(wanted)
        return 0
    before = FILE.read_text().splitlines(keepends=True)
    after = wanted.decode().splitlines(keepends=True)
    lines = list(difflib.unified_diff(before, after, "committed/openapi.json", "declared/openapi.json"))
    sys.stdout.writelines(lines)
    if lines:
        sys.stderr.write(
            "docs/openapi.json differs from the calls as declared: run scripts/write_openapi.py\n"
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
