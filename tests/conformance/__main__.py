"""Runs programs of others, in the versions that are written down, on a server of the default model.

``make conformance``, or ``PYTHONPATH=tests python -m conformance``. Each suite has an environment of its own, made at
the first run in ``.conformance``; one whose packages cannot be fetched is skipped, and named at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.environments import UnavailableError

from conformance.checks import CHECKS, ConformanceError, Served
from manyhats.client import Client
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.home import default_home
from restart_under_load import serve_command, serving

TASKS = Path(__file__).parents[2] / "examples" / "adapters"


@contextmanager
def served_examples(model: str, root: Path) -> Iterator[Served]:
    """A server of its own, with the example tasks."""
    located = locate_model(model, default_home())
    command = serve_command(
        root / "server.yaml", model=model, store=str(root / "store"), adapter_roots=[str(TASKS)]
    )
    tasks = sorted(path.name for path in TASKS.iterdir() if path.is_dir())
    with serving(command) as (_, ready):
        with Client(ready["grpc"]) as client:
            for task in tasks:
                client.register_adapter(task, task)
        yield Served(ready["grpc"], ready["http"], located.name, tasks, located.directory)


def main() -> int:
    """Print a line for each suite; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or directory (%(default)s)")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(CHECKS)}; all by default")
    options = parser.parse_args()
    for suite in options.suites:
        if suite not in CHECKS:
            parser.error(f"{suite} is no suite; there are {', '.join(CHECKS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed, skipped = [], []
    with (
        tempfile.TemporaryDirectory(prefix="conformance-") as name,
        served_examples(options.model, Path(name)) as served,
    ):
        for suite in options.suites or CHECKS:
            since_s = time.monotonic()
            try:
                print(f"{suite}: {CHECKS[suite](served)} [{time.monotonic() - since_s:.0f} s]", flush=True)
            except UnavailableError as error:
                skipped.append(suite)
                print(f"{suite}: SKIPPED: {error}", flush=True)
            except ConformanceError as error:
                failed.append(suite)
                print(f"{suite}: FAILED: {error}", flush=True)
    if skipped:
        print(f"SKIPPED, and so not known to conform: {', '.join(skipped)}", file=sys.stderr)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
