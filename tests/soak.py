"""Keeps a server of the default model busy with many tasks, and looks at whether it stays as it was.

``make soak`` (``SOAK_MINUTES=10``), or ``python -m soak`` in ``tests``. More adapters than fit in memory are asked for,
by Zipf's law; callers leave and give up; versions change, come and go. Every request must have one end, and none of the
server's making. Memory, threads and open files must be those of the first minutes, and in the end nothing may be left:
no sequence, no KV block, no lease that keeps a task from being deleted, no file in the store.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from hostile_load.watching import probe, scraped
from manyhats.client import AsyncClient, Client, ManyhatsError
from manyhats.load.report import Objective, Report, report, rows
from manyhats.load.run import LEFT, OK, Answer, run_load
from manyhats.load.workload import Workload
from restart_under_load import check_files, describe_model, serve_command, serving
from support.factories.adapters import make_lora

NUM_TASKS = 40
NUM_SLOTS = 16
RANK = 8
RESIDENT_SHARE = 0.4
"""Of the adapters' bytes, what may be in memory."""
ENDS = {OK, LEFT, "QUEUE_FULL", "DEADLINE_EXCEEDED"}
"""How a request may end."""
MAX_GROWTH_BYTES = 96 << 20
MAX_MORE_FILES = 16


class SoakError(Exception):
    """The server broke a promise."""


@dataclass(slots=True)
class Held:
    """What the server's process held at moments of the soak."""

    rss_bytes: list[int] = field(default_factory=list)
    num_threads: list[int] = field(default_factory=list)
    num_files: list[int] = field(default_factory=list)

    def look(self, process: psutil.Process, http: str) -> None:
        """Note what it holds now; it must be ready."""
        self.rss_bytes.append(probe(process, http).rss_bytes)
        self.num_threads.append(process.num_threads())
        self.num_files.append(process.num_fds())

    def check(self) -> str:
        """What was held in the first and the last third at most, in words.

        Raises:
            SoakError: it has grown.
        """
        said = []
        for name, values, allowed in (
            ("bytes", self.rss_bytes, MAX_GROWTH_BYTES),
            ("threads", self.num_threads, MAX_MORE_FILES),
            ("open files", self.num_files, MAX_MORE_FILES),
        ):
            third = max(1, len(values) // 3)
            first, last = max(values[:third]), max(values[-third:])
            said.append(f"{name} {first:,} → {last:,}")
            if last > first + allowed:
                raise SoakError(f"more and more is held: {said[-1]}")
        return "; ".join(said)


@dataclass(slots=True)
class Churn:
    """Registers and deletes versions of the tasks, and a task that is there at times only, until told to stop."""

    target: str
    root: Path
    num_done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """While it goes on."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        rng = random.Random(0)
        with Client(self.target) as client:
            while not self._stop.wait(1.0):
                # Of its own files a task has a version already.
                task, other = map(_task, rng.sample(range(NUM_TASKS), 2))
                try:
                    self._turn(client, task, other)
                except ManyhatsError as error:
                    self.errors.append(f"{error.reason}: {error}")

    def _turn(self, client: Client, task: str, other: str) -> None:
        version = client.upload_adapter(
            task, self.root / other, labels={"round": str(self.num_done["upload"])}
        )
        self.num_done["upload"] += 1
        client.activate_adapter(f"{task}@1")
        client.delete_adapter(f"{task}@{version.adapter.version}", force=True)
        client.upload_adapter("fleeting", self.root / other)
        client.generate("Once", task_id="fleeting", max_new_tokens=4)
        client.delete_adapter("fleeting", force=True)
        self.num_done["turn"] += 1


def _task(index: int) -> str:
    return f"task{index:02}"


def soak(model: str, minutes: float, rate: float) -> tuple[Report, str]:
    """Keep a server busy for so long.

    Returns:
        How well it served, and what it held.

    Raises:
        SoakError: it broke a promise.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        root = Path(name)
        num_bytes = _make_adapters(root / "adapters", model)
        command = serve_command(
            root / "server.yaml",
            model=model,
            store=str(root / "store"),
            max_adapters=NUM_SLOTS,
            adapter_memory_bytes=int(RESIDENT_SHARE * num_bytes),
        )
        with serving(command) as (process, ready):
            with Client(ready["grpc"]) as client:
                for index in range(NUM_TASKS):
                    client.upload_adapter(_task(index), root / "adapters" / _task(index))
            held, answers = Held(), []
            watched = psutil.Process(process.pid)
            churn = Churn(ready["grpc"], root / "adapters")
            workload = Workload(
                rate=rate,
                duration_s=60 * minutes,
                popularity="zipf",
                cancel_share=0.2,
                swap_every_s=2.0,
                deadline_s=20.0,
            )
            with churn.going_on(), _watching(held, watched, ready["http"]):
                answers = asyncio.run(_load(ready["grpc"], workload))
            _check_ends(answers, churn)
            said = held.check()
            _check_idle(ready["grpc"], ready["http"])
            process.terminate()
            if process.wait(60) not in (0, 143):
                raise SoakError(f"the server ended with {process.returncode}")
        check_files(root / "store", 0)
    return report(workload, Objective(), answers), said


def _make_adapters(root: Path, model: str) -> int:
    """Returns their bytes."""
    base = describe_model(model)
    for index in range(NUM_TASKS):
        make_lora(root / _task(index), base, rank=RANK, seed=index)
    return sum(path.stat().st_size for path in root.rglob("*.safetensors"))


async def _load(target: str, workload: Workload) -> list[Answer]:
    tasks = [_task(index) for index in range(NUM_TASKS)]
    async with AsyncClient(target, retries=False) as client:
        return await run_load(client, workload, [*tasks, ""], {task: [1] for task in tasks})


@contextmanager
def _watching(held: Held, process: psutil.Process, http: str) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(2.0):
            held.look(process, http)

    held.look(process, http)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check_ends(answers: Sequence[Answer], churn: Churn) -> None:
    outcomes = Counter(answer.outcome for answer in answers)
    wrong = {name: number for name, number in outcomes.items() if name not in ENDS}
    if wrong or churn.errors:
        raise SoakError(f"ends that no caller made: {wrong}; of changes: {churn.errors[:5]}")
    if not outcomes[OK] or not churn.num_done["turn"]:
        raise SoakError(f"nothing was done: {outcomes}, {churn.num_done}")
    short = [answer for answer in answers if answer.outcome == OK and not answer.num_tokens]
    if short:
        raise SoakError(f"{len(short)} answers were empty")


def _check_idle(target: str, http: str) -> None:
    """Everything can be deleted, unforced; then nothing is held."""
    with Client(target) as client:
        for index in range(NUM_TASKS):
            _delete(client, _task(index))
    end_s = time.monotonic() + 30.0
    while left := _left(http):
        if time.monotonic() > end_s:
            raise SoakError(f"left when all had ended: {left}")
        time.sleep(0.5)


def _delete(client: Client, task: str) -> None:
    """Unforced, at once or as soon as what a caller left a moment ago has ended."""
    for _ in range(20):
        try:
            client.delete_adapter(task)
        except ManyhatsError as error:
            if error.reason != "ADAPTER_IN_USE":
                raise
            time.sleep(0.5)
        else:
            return
    raise SoakError(f"{task} is in use by nobody")


def _left(http: str) -> dict[str, float]:
    names = {"manyhats_requests_running", "manyhats_requests_waiting", "manyhats_adapter_resident"}
    return {
        f"{each.name} {each.labels}": each.value
        for each in scraped(http)
        if each.value > 0 and (each.name in names or each.labels.get("state") == "used")
    }


def main() -> None:
    """Print how well the server did, and what it held."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or directory (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="(%(default)s)")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (%(default)s)")
    options = parser.parse_args()
    found, held = soak(options.model, options.minutes, options.rate)
    for row in rows(found, 5):
        print("\t".join(row))
    print(
        f"{found.goodput:.2f} good answers and {found.tokens_per_s:.0f} tokens a second; {held}; nothing left"
    )


if __name__ == "__main__":
    main()
