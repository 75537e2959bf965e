"""Other servers as processes: started, waited for, stopped whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks.peers.peer import PeerFailedError

_READY_LIMIT_S = 900.0
_STOP_LIMIT_S = 30.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready; ``address`` is ``host:port``."""

    pid: int
    address: str


@contextmanager
def running(command: Callable[[int], Sequence[str]], variables: Mapping[str, str]) -> Iterator[Running]:
    """Runs a server that says at ``/health`` when it is ready; stops it and its children at the end.

    Args:
        command: from the port to what serves on it, on 127.0.0.1.
        variables: of its environment, besides this process's.

    Raises:
        PeerFailedError: it did not become ready; the text ends with its log's last lines.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="manyhats-peer-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command(port),
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                cwd=directory,
                start_new_session=True,
            )
        try:
            _wait_ready(process, f"127.0.0.1:{port}", log)
            yield Running(process.pid, f"127.0.0.1:{port}")
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until_s = time.monotonic() + _READY_LIMIT_S
    while time.monotonic() < until_s and process.poll() is None:
        if _is_healthy(address):
            return
        time.sleep(_POLL_S)
    said = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    state = "took too long to start" if process.poll() is None else f"ended with {process.returncode}"
    raise PeerFailedError(f"the server {state}; its log ends with\n{said}")


def _is_healthy(address: str) -> bool:
    connection = HTTPConnection(address, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server first, so that it can end its children; then whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
