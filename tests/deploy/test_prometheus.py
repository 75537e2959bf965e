"""A real Prometheus scrapes a server under load, and is asked all that dashboard and alerts ask."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import pytest

from manyhats.server.access.tokens import Role, new_token, token_entry
from support.factories.adapters import make_lora
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny
from support.harnesses.monitoring import DEPLOY, alerts, board_queries
from support.servers.collector import Collector, running_collector
from support.servers.prometheus import Prometheus, running_prometheus
from support.servers.secure import make_pki

pytestmark = pytest.mark.deploy

TASKS = [f"task-{index:02}" for index in range(12)]
# Four adapters have room, and two more while all of those are in use: tasks take turns in memory.
LITTLE_MEMORY = "300KiB"
LIMIT_S = 60.0


@dataclass(frozen=True)
class Server:
    """A server process, what its callers show, and where its traces go."""

    http: str
    token: str
    collector: Collector

    def post(self, path: str, body: dict[str, Any]) -> int:
        """The status of an answer."""
        head = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.http}{path}", json.dumps(body).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``manyhats serve`` on a tiny model and many tasks, with certificate and tokens, so that all metrics are there."""
    directory = tmp_path_factory.mktemp("watched")
    base = make_checkpoint(directory / "base", seed=5)
    description = load_tiny(base).description
    registered = []
    for seed, task in enumerate(TASKS):
        make_lora(directory / "sources" / task, description, seed=seed)
        registered += ["--register", f"{task}={directory / 'sources' / task}"]
    token, tokens, pki = new_token(), directory / "tokens.yaml", make_pki(directory / "pki")
    tokens.write_text(token_entry("load", token, [Role.GENERATE, Role.MANAGE]))
    command = [sys.executable, "-m", "manyhats.cli", "serve", "--log-format", "json"]
    command += ["--model", str(base), "--store", str(directory / "store"), "--dtype", "float32"]
    command += ["--adapter-root", str(directory / "sources"), "--grpc-port", "0", "--http-port", "0"]
    command += ["--tls-cert", str(pki.files.certificate), "--tls-key", str(pki.files.key), "--http-insecure"]
    command += ["--token-file", str(tokens), "--adapter-memory-bytes", LITTLE_MEMORY, *registered]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OTEL_BSP_SCHEDULE_DELAY": "500"}
    with (
        running_collector() as collector,
        (directory / "log").open("w") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**environment, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (directory / "log").read_text()
            yield Server(json.loads(line)["http"], token, collector)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped the server for a while, under load that goes on."""
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), server.http) as prometheus, load(server):
        prometheus.wait('up{job="manyhats"} == 1')
        prometheus.wait("increase(manyhats_generated_tokens_total[20s]) > 0")
        time.sleep(5)  # rates need several scrapes, after the first of each series
        yield prometheus


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Callers who ask all tasks at once, again and again."""
    stop = Event()

    def call(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            body: dict[str, Any] = {
                "model": rng.choice([*TASKS, ""]),
                "messages": [{"role": "user", "content": "x" * rng.randint(1, 60)}],
                "max_tokens": rng.randint(1, 30),
                "stream": rng.random() < 0.5,
            }
            if rng.random() < 0.2:
                body["guided_regex"] = f"[ab]{{1,9}}{rng.randrange(10**6)}"  # not compiled before
            if rng.random() < 0.1:
                body["model"] = "nobody"
            server.post("/v1/chat/completions", body)

    threads = [Thread(target=call, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("title", board_queries())
def test_every_query_of_the_dashboard_returns_data(title: str, prometheus: Prometheus) -> None:
    end_s = time.monotonic() + LIMIT_S
    while True:
        found = prometheus.ask(board_queries()[title])
        if any(math.isfinite(value) for _, value in found):
            return
        assert time.monotonic() < end_s, f"{title}: {board_queries()[title]} gives {found}"
        time.sleep(0.5)


@pytest.mark.parametrize("name", alerts())
def test_every_alert_evaluates_on_series_that_there_are(name: str, prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules", type="alert")["groups"]
    (rule,) = [rule for rule in group["rules"] if rule["name"] == name]
    assert (rule["health"], rule.get("lastError", "")) == ("ok", "")
    prometheus.ask(alerts()[name]["expr"])
    for series in re.findall(r"\b(?:up\b|manyhats_\w+)", alerts()[name]["expr"]):
        assert prometheus.ask(series), series


def test_a_loaded_server_that_is_well_raises_no_critical_alert(prometheus: Prometheus) -> None:
    raised = [each["labels"]["alertname"] for each in prometheus.get("alerts")["alerts"]]
    critical = {name for name, rule in alerts().items() if rule["labels"]["severity"] == "critical"}
    assert critical.isdisjoint(raised)


def test_gateways_series_are_not_kept_and_a_scrape_is_quick(prometheus: Prometheus) -> None:
    assert prometheus.ask('{__name__=~"vllm:.*"}') == []
    assert prometheus.ask('{__name__=~"manyhats_.*"}')
    ((_, seconds),) = prometheus.ask('max(max_over_time(scrape_duration_seconds{job="manyhats"}[20s]))')
    assert seconds < 1


@pytest.mark.usefixtures("prometheus")
def test_spans_tell_how_long_requests_waited_for_adapters_and_computed(server: Server) -> None:
    spans = [told for name, told in server.collector.spans() if name.startswith("chat task-")]
    parts = ("queue", "adapter_load", "prefill", "decode")
    times = [[told[f"manyhats.{part}_ms"] for part in parts] for told in spans]
    assert len(times) > 20
    assert any(load_ms > 0 for _, load_ms, _, _ in times)  # memory is for fewer adapters than are asked
    assert all(queue_ms >= load_ms for queue_ms, load_ms, _, _ in times)
    assert all(prefill_ms > 0 for _, _, prefill_ms, _ in times)
    assert any(decode_ms > 0 for *_, decode_ms in times)


@pytest.mark.parametrize(
    ("what", "file"),
    [("check config", "prometheus.yml"), ("check rules", "rules.yml"), ("test rules", "rules_test.yml")],
)
def test_promtool_passes(what: str, file: str) -> None:
    command = ["promtool", *what.split(), file]
    done = subprocess.run(
        command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_has_no_complaint_of_the_exposition_but_the_gateways_colons(server: Server) -> None:
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=10) as answer:
        text = answer.read()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
    )
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if not line.startswith("vllm:")] == []
