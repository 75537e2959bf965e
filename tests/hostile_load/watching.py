"""What well-behaved callers and an operator see of a server under attack."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from hostile_load.attacks import ALLOWED
from manyhats.v1 import generation_pb2, generation_pb2_grpc

NUM_STREAMS = 4
_REQUESTS = "manyhats_requests_total"


class HostileLoadError(Exception):
    """The server broke a promise."""


@dataclass(slots=True)
class Watched:
    """Streams that read all they get, the gaps between their tokens, and their ends."""

    target: str
    gaps_s: list[float] = field(default_factory=list)
    num_ended: int = 0
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """While they go on."""
        threads = [threading.Thread(target=self._stream, args=(index,)) for index in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _stream(self, index: int) -> None:
        with grpc.insecure_channel(self.target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = generation_pb2.GenerateRequest(
                text=f"Chapter {index}.", stopping={"max_new_tokens": 400, "ignore_eos": True}
            )
            while not self._stop.is_set():
                call = stub.GenerateStream(request)
                try:
                    self._read(call)
                except grpc.RpcError as error:
                    if (
                        error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
                    ):  # a flood's queue is full for all
                        self.errors.append(f"{error.code().name}: {error.details()}")
                    time.sleep(0.2)
                self.num_ended += 1

    def _read(self, call: Any) -> None:
        before_s, num_reasons = None, 0
        for message in call:
            now_s = time.perf_counter()
            if before_s is not None:
                self.gaps_s.append(now_s - before_s)
            before_s = now_s
            num_reasons += message.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
            if self._stop.is_set():
                call.cancel()
                return
        if num_reasons != 1:
            self.errors.append(f"a stream ended with {num_reasons} reasons")


@dataclass(frozen=True, slots=True)
class Probe:
    """What an operator sees of the server at one moment."""

    rss_bytes: int
    metrics_s: float


def probe(process: psutil.Process, http: str) -> Probe:
    """Its memory, and how long ``/metrics`` takes.

    Raises:
        HTTPError: it is not ready.
    """
    started = time.perf_counter()
    _get(http, "/metrics")
    metrics_s = time.perf_counter() - started
    _get(http, "/readyz")
    return Probe(process.memory_info().rss, metrics_s)


def scraped(http: str) -> Iterator[Sample]:
    """What ``/metrics`` says."""
    for family in text_string_to_metric_families(_get(http, "/metrics")):
        yield from family.samples


def counted(http: str) -> Counter[str]:
    """Calls that the server counted, by method and status."""
    counts: Counter[str] = Counter()
    for sample in scraped(http):
        if sample.name == _REQUESTS:
            counts[f"{sample.labels['method']} {sample.labels['code']}"] += int(sample.value)
    return counts


def turns_over(http: str, limit_s: float) -> int:
    """How many turns of the server's event loop took longer than a bucket's bound."""
    name = "manyhats_event_loop_turn_seconds"
    counts = {
        sample.labels.get("le", "all"): sample.value
        for sample in scraped(http)
        if sample.name in (f"{name}_bucket", f"{name}_count")
    }
    return int(counts["all"] - counts[str(limit_s)])


def _get(http: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{http}{path}", timeout=20) as answer:
        return str(answer.read().decode())


@dataclass(frozen=True, slots=True)
class Attacked:
    """What was seen during an attack."""

    gaps_s: list[float]
    statuses: Counter[str]
    probes: list[Probe]
    num_ended: int

    @property
    def codes(self) -> str:
        """Statuses, whatever the method, with their numbers."""
        codes: Counter[str] = Counter()
        for status, number in self.statuses.items():
            codes[status.split()[1]] += number
        return ", ".join(f"{number} {code}" for code, number in codes.most_common())


@dataclass(frozen=True, slots=True)
class Server:
    """A server under attack."""

    process: psutil.Process
    target: str
    http: str

    @contextmanager
    def attacked(
        self, kinds: Sequence[str], seconds: float, seed: int
    ) -> Iterator[list[subprocess.Popen[str]]]:
        """While processes attack it, one for each kind."""
        command = [sys.executable, "-m", "hostile_load.attacks", self.target, self.http]
        processes = [
            subprocess.Popen(
                [*command, kind, "--seconds", str(seconds), "--seed", str(seed)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for kind in kinds
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def attack(self, kinds: Sequence[str], seconds: float, seed: int = 0) -> Attacked:
        """Attack it for a while, and see what its well-behaved callers notice.

        Raises:
            HostileLoadError: it does not live, or a call ended with a fault of the server.
        """
        watched = Watched(self.target)
        probes: list[Probe] = []
        statuses: Counter[str] = Counter()
        with watched.going_on(), self.attacked(kinds, seconds, seed) as attackers:
            end_s = time.monotonic() + seconds + 120.0
            while any(attacker.poll() is None for attacker in attackers):
                if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
                    raise HostileLoadError("the server has ended")
                if time.monotonic() > end_s:
                    raise HostileLoadError("an attack did not end")
                probes.append(probe(self.process, self.http))
                time.sleep(0.5)
            for attacker in attackers:
                assert attacker.stdout is not None
                statuses.update(json.loads(attacker.stdout.read() or "{}"))
        faults = sorted(status for status in statuses if status.split()[1] not in ALLOWED)
        if faults or watched.errors:
            raise HostileLoadError(f"faults: {faults}, of the well-behaved: {watched.errors[:5]}")
        return Attacked(watched.gaps_s, statuses, probes, watched.num_ended)
