"""The server as a process: how soon it is ready, and what it keeps in memory."""

from __future__ import annotations

import json
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Measurement
from benchmarks.workload import Workload

_READY_LIMIT_S = 600.0
_STOP_LIMIT_S = 60.0
_MIB = 2**20
_PART = re.compile(r'^manyhats_model_bytes\{part="(\w+)"\} (\S+)$', re.MULTILINE)
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class ServerFailedError(Exception):
    """The server did not become ready; the text ends with its log's last lines."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready; ``ready_s`` is from its process's start to its ready line."""

    pid: int
    grpc: str
    http: str
    ready_s: float


@contextmanager
def serving(
    workload: Workload, store: Path | None = None, max_sequences: int = 64, **settings: object
) -> Iterator[RunningServer]:
    """Runs ``manyhats serve`` on free ports, with a new store unless one is given; stops it at the end.

    Args:
        workload: model and adapters.
        store: its directory.
        max_sequences: that run at once.
        settings: others of the server.

    Raises:
        ServerFailedError: it did not become ready.
    """
    with TemporaryDirectory(prefix="manyhats-bench-") as directory:
        log_path = Path(directory) / "log"
        with log_path.open("wb") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                _command(
                    workload,
                    Path(directory),
                    store or Path(directory) / "store",
                    {"max_sequences": max_sequences, **settings},
                ),
                stdout=subprocess.PIPE,
                stderr=log,
            )
            try:
                ready = _read_ready_line(process)
                ready_s = time.perf_counter() - started
                if ready is None:
                    tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-20:])
                    raise ServerFailedError(f"the server did not become ready; its log ends with\n{tail}")
                yield RunningServer(process.pid, str(ready["grpc"]), str(ready["http"]), ready_s)
            finally:
                _stop(process)


def _command(workload: Workload, directory: Path, store: Path, others: Mapping[str, object]) -> list[str]:
    settings = directory / "server.yaml"
    roots = sorted({str(path.parent) for path in workload.adapters.values()})
    settings.write_text(
        json.dumps(  # which is YAML, too
            {
                "model": workload.model,
                "store": str(store),
                "adapter_roots": roots,
                "grpc_port": 0,
                "http_port": 0,
                "num_threads": workload.settings.threads,
                **others,
                "log_format": "json",
                "log_level": "warning",
            }
        )
    )
    return [sys.executable, "-m", "manyhats.cli", "serve", "--config", str(settings)]


def _read_ready_line(process: subprocess.Popen[bytes]) -> dict[str, object] | None:
    """The ready line's facts; None if the process ends first, or takes too long."""
    if process.stdout is None or not select.select([process.stdout], [], [], _READY_LIMIT_S)[0]:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def measure_start(workload: Workload, store: Path | None = None) -> Measurement:
    """One start of the server: its process's beginning to its ready line."""
    with serving(workload, store) as server:
        return Measurement({"ready_s": server.ready_s})


def measure_memory(server: RunningServer, workload: Workload) -> Measurement:
    """Bytes that the server holds, part by part, and the most its process ever held."""
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=30) as response:
        parts = {part: float(value) for part, value in _PART.findall(response.read().decode())}
    figures = {f"{part}_mib": num_bytes / _MIB for part, num_bytes in parts.items()}
    figures["base_bytes_per_parameter"] = parts["base"] / workload.linear_parameters
    peak = peak_rss_bytes(server.pid)
    if peak is not None:
        figures["peak_rss_mib"] = peak / _MIB
    return Measurement(figures)


def peak_rss_bytes(pid: int) -> int | None:
    """The most memory a process had resident; None where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    found = _PEAK.search(status.read_text()) if status.exists() else None
    return None if found is None else 1024 * int(found.group(1))
