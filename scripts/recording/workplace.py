"""Where a recording runs: a directory of its own, commands in it, and servers of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from manyhats.client import Client

COMMAND = (sys.executable, "-m", "manyhats.cli")
_READY_S = 600
_STOP_S = 60


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready: a client of its port, and its ports' addresses."""

    client: Client
    grpc: str
    http: str


class Workplace:
    """Commands run in its directory, so that what they are told and what they record are relative paths.

    The default model and compiled kernels are those of the user's home; NF4 weights are made anew.

    Args:
        root: empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        own = {name: value for name, value in os.environ.items() if not name.startswith("MANYHATS_")}
        own.pop("PYTHONDONTWRITEBYTECODE", None)
        self._environment = {**own, "MANYHATS_HOME": "home", "OMP_NUM_THREADS": "1"}
        users = Path(os.environ.get("MANYHATS_HOME") or Path.home() / ".cache" / "manyhats")
        self.home.mkdir()
        for name in ("kernels", "models"):
            (users / name).mkdir(parents=True, exist_ok=True)
            (self.home / name).symlink_to(users.resolve() / name)

    def run(self, *args: str) -> str:
        """What a command prints on stdout.

        Raises:
            RuntimeError: it fails; what it said is in the message.
        """
        done = subprocess.run(
            [*COMMAND, *args], cwd=self.root, env=self._environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"manyhats {' '.join(args)}: {done.stderr}")
        return done.stdout

    @contextmanager
    def serve(self, name: str, *args: str) -> Iterator[Served]:
        """A server's process, from when it is ready until it has stopped; its log is ``NAME.log``."""
        log = self.root / f"{name}.log"
        command = [*COMMAND, "serve", "--grpc-port", "0", "--http-port", "0", "--log-format", "json", *args]
        with (
            log.open("w") as said,
            subprocess.Popen(
                command,
                cwd=self.root,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"the server {name} does not start: {log.read_text()}")
                ready = json.loads(line)
                with Client(ready["grpc"], timeout_s=_READY_S) as client:
                    yield Served(client, ready["grpc"], ready["http"])
            finally:
                process.terminate()
                process.wait(_STOP_S)
