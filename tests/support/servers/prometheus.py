"""A Prometheus of the tests' own, of Debian's package."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.harnesses.monitoring import DEPLOY

CONFIG = DEPLOY / "prometheus/prometheus.yml"


@dataclass(frozen=True)
class Prometheus:
    """A running one, at an address."""

    address: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; an error of Prometheus' fails the test."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def ask(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series that an expression gives now."""
        data = self.get("query", query=expr)
        assert data["resultType"] == "vector", expr
        return [(each["metric"], float(each["value"][1])) for each in data["result"]]

    def wait(self, expr: str, timeout_s: float = 60.0) -> None:
        """Wait until an expression gives something."""
        end_s = time.monotonic() + timeout_s
        while not self.ask(expr):
            assert time.monotonic() < end_s, f"nothing in {timeout_s} s: {expr}"
            time.sleep(0.2)


@contextmanager
def running_prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """One with the project's own configuration, but for its target and that it looks each second."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{_free_port()}"
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log, cwd=directory
        )
        try:
            _wait_until_ready(address, process)
            yield Prometheus(address)
        finally:
            process.terminate()
            process.wait(20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + 30
    while True:
        assert process.poll() is None, "Prometheus has ended"
        try:
            with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                return
        except OSError:
            assert time.monotonic() < end_s, "Prometheus does not become ready"
            time.sleep(0.1)
