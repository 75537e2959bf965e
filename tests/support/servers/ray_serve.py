"""A real Ray Serve of the tests' own, on this machine, in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from benchmarks import environments

from manyhats.engine.backends.cpu.compile import cache_directory

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "deploy/ray/serve.yaml"
ENVIRONMENT = ROOT / ".deploy/ray"
NUM_REPLICAS = 2
START_LIMIT_S = 600.0  # with kernels to compile
_REPLICA = "ServeReplica:manyhats"
_DASHBOARD = re.compile(r"(http://127\.0\.0\.1:\d+)")
_CALL = re.compile(rf"\({_REPLICA}\S* pid=(\d+)\).* call .*method=(\w+) .*task=(\S*)")


def serve_program() -> Path:
    """Ray's ``serve`` beside the project's packages; installed at the first call."""
    python = environments.python_of(ENVIRONMENT, Path(__file__).with_name("ray.txt"))
    (purelib,) = ENVIRONMENT.glob("lib/python*/site-packages")
    (purelib / "project.pth").write_text(sysconfig.get_path("purelib"))
    return python.with_name("serve")


@dataclass(frozen=True)
class RayServe:
    """A running one.

    Attributes:
        process: ``serve run``, whose children are all of Ray's.
        grpc, http: addresses of its proxies.
        log: what it and the replicas print.
        deploy: changes how many replicas there are, by ``serve deploy``: as many as that, or up to ``at_most`` by what
            they have to do; the rest are fields of the scaling.
    """

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    log: Path
    deploy: Callable[..., None]

    def replicas(self) -> list[psutil.Process]:
        """Processes of replicas."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if _REPLICA in " ".join(_command(child))]

    def calls(self) -> Counter[tuple[int, str, str]]:
        """How often each replica, by its process, answered each method for each task."""
        found = _CALL.findall(self.log.read_text(encoding="utf-8", errors="replace"))
        return Counter((int(pid), method, task) for pid, method, task in found)

    def wait_for_calls(self, num_calls: int, method: str, tasks: set[str]) -> dict[str, Counter[int]]:
        """Task → how many of its calls each replica answered, once as many as that are in the log."""
        end_s = time.monotonic() + 60
        while True:
            homes: dict[str, Counter[int]] = {task: Counter() for task in tasks}
            for (pid, called, task), count in self.calls().items():
                if called == method and task in tasks:
                    homes[task][pid] += count
            if sum(each.total() for each in homes.values()) >= num_calls:
                return homes
            assert time.monotonic() < end_s, homes
            time.sleep(0.2)

    def num_starts(self) -> int:
        """How often a replica has become ready."""
        return self.log.read_text(encoding="utf-8", errors="replace").count("state=ready")

    def wait_until_ready(self, num_starts: int) -> None:
        """Wait until replicas have become ready that often since the beginning."""
        end_s = time.monotonic() + START_LIMIT_S
        while self.num_starts() < num_starts:
            is_over = self.process.poll() is not None or time.monotonic() > end_s
            assert not is_over, self.log.read_text()[-4000:]
            time.sleep(0.5)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running_ray(directory: Path, settings: Mapping[str, Any]) -> Iterator[RayServe]:
    """Two replicas with these settings, by the project's own configuration but for ports and sizes."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    http_port, grpc_port = free_port(), free_port()
    config["http_options"]["port"], config["grpc_options"]["port"] = http_port, grpc_port
    (application,) = config["applications"]
    application["args"] = {**settings}
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 0.25}
    log = directory / "serve.log"
    home = tempfile.mkdtemp(prefix="ray-")  # short: paths of sockets may have 107 characters
    environment = _environment(home)
    command = [str(serve_program()), "run", str(_written(config, directory, NUM_REPLICAS))]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=directory
        )

    def deploy(num_replicas: int, at_most: int | None = None, **scaling: float) -> None:
        (dashboard,) = set(_DASHBOARD.findall(log.read_text(encoding="utf-8", errors="replace")))
        file = _written(config, directory, num_replicas, at_most, **scaling)
        again = [str(serve_program()), "deploy", "--address", dashboard, str(file)]
        subprocess.run(again, env={**environment, "RAY_AUTH_MODE": "token"}, cwd=directory, check=True)

    try:
        served = RayServe(process, f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}", log, deploy)
        served.wait_until_ready(NUM_REPLICAS)
        yield served
    finally:
        _end(process)
        shutil.rmtree(home, ignore_errors=True)


def _written(
    config: dict[str, Any], directory: Path, num_replicas: int, at_most: int | None = None, **scaling: float
) -> Path:
    """The configuration with as many replicas as that, in a file."""
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    limits = {"min_replicas": num_replicas, "max_replicas": at_most or num_replicas}
    deployment["autoscaling_config"] |= {**limits, **scaling}
    file = directory / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _environment(home: str) -> dict[str, str]:
    """Ray writes to the home, and says nothing to its makers."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANYHATS_"))},
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path and "site-packages" not in path),
        "NUMBA_CACHE_DIR": str(cache_directory()),
        "HOME": home,
        "RAY_TMPDIR": home,
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End Ray and what it started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
