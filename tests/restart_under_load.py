"""Kills a server in the middle of uploads under load, starts it again on its store, and looks at what is there.

``make test-restarts``, or ``python -m restart_under_load`` in ``tests``. What was acknowledged must be there and serve;
what was cut off must be there whole or not at all, and can be repeated; nothing is left over. The load are uploads, one
after the other from several callers, and requests on the tasks that there are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.client import Client, ManyhatsError
from manyhats.engine.checkpoints.checkpoint import read_json
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.home import default_home
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import read_family
from support.factories.adapters import make_lora

NUM_UPLOADERS = 4
NUM_CALLERS = 4
RANK = 16
_PATIENCE_S = 60.0
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Command = Callable[[Path], Sequence[str]]
"""From a store to what serves it, and prints a JSON line with its address when it is ready."""


class RestartError(Exception):
    """Something is lost, half, damaged or left over."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An adapter on this side, for a task of its own; ``digest`` is that of its files."""

    task_id: str
    directory: Path
    digest: str

    def send(self, client: Client) -> None:
        """Upload it; again is the same.

        Raises:
            ManyhatsError: it was not acknowledged.
        """
        answer = client.upload_adapter(self.task_id, self.directory, request_id=self.task_id)
        _require(answer.adapter.digest == self.digest, f"{self.task_id} was taken for something else")


class Sources:
    """Makes one upload after the other: the same weights, with another ``lora_alpha`` each. Safe in any thread."""

    def __init__(self, root: Path, base: BaseDescription) -> None:
        self._root = root
        self._weights = make_lora(root / "weights", base, rank=RANK, dtype=torch.bfloat16)
        self._lock = threading.Lock()
        self._count = 0

    def next(self) -> Upload:
        """One that was not there before."""
        with self._lock:
            self._count += 1
            task_id = f"task{self._count:04}"
            directory = self._root / task_id
            directory.mkdir()
            os.link(self._weights / WEIGHTS, directory / WEIGHTS)
            config = {**json.loads((self._weights / CONFIG).read_text()), "lora_alpha": RANK + self._count}
            (directory / CONFIG).write_text(json.dumps(config))
            files = {path.name: path.read_bytes() for path in directory.iterdir()}
            return Upload(task_id, directory, artifact_digest(files))


class Load:
    """Uploads and requests until the server is killed.

    Attributes:
        acknowledged, cut_off: uploads that the server answered, and those that its death left without an answer.
        num_answers: to requests.
    """

    def __init__(self, target: str, sources: Sources, known: Sequence[Upload]) -> None:
        self.acknowledged: list[Upload] = []
        self.cut_off: list[Upload] = []
        self.num_answers = 0
        self._target = target
        self._sources = sources
        self._task_ids = ["", *(upload.task_id for upload in known)]
        self._is_killed = False
        self._changed = threading.Condition()
        self._num_under_way = 0

    def run(self, process: subprocess.Popen[str], seconds: float) -> None:
        """Go on for a while, and until an upload is acknowledged; kill the server while another is under way.

        It returns when everybody noticed.
        """
        with ThreadPoolExecutor(NUM_UPLOADERS + NUM_CALLERS) as threads:
            work = [threads.submit(self._upload) for _ in range(NUM_UPLOADERS)]
            work += [threads.submit(self._call) for _ in range(NUM_CALLERS)]
            time.sleep(seconds)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._num_under_way > 0 and bool(self.acknowledged), _PATIENCE_S
                )
                self._is_killed = True
                process.kill()
        for each in work:
            each.result()

    def _upload(self) -> None:
        with Client(self._target) as client:
            while not self._is_killed:
                upload = self._sources.next()
                with self._changed:
                    self._num_under_way += 1
                    self._changed.notify()
                ended = self.acknowledged if self._survives(partial(upload.send, client)) else self.cut_off
                with self._changed:
                    self._num_under_way -= 1
                    ended.append(upload)
                    self._changed.notify()

    def _call(self) -> None:
        with Client(self._target) as client:
            while not self._is_killed:
                task_id = random.choice(self._task_ids)
                request = partial(client.generate, "Once", task_id=task_id, max_new_tokens=16)
                is_answered = self._survives(request)
                with self._changed:
                    self.num_answers += is_answered

    def _survives(self, call: Callable[[], object]) -> bool:
        """Whether a call was answered before the server was killed; nothing else may keep it from that."""
        try:
            call()
        except ManyhatsError:
            if not self._is_killed:
                raise
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """One kill, and what was found after it; ``num_whole`` of the uploads cut off were there all the same."""

    num_acknowledged: int
    num_cut_off: int
    num_answers: int
    num_unfinished: int
    num_serving: int
    num_whole: int

    def __str__(self) -> str:
        return (
            f"killed after {self.num_acknowledged} uploads and {self.num_answers} answers, "
            f"with {self.num_cut_off} uploads under way and {self.num_unfinished} unfinished directories on disk; "
            f"restarted: {self.num_whole} of these uploads were there whole, none in part; repeated, and "
            f"{self.num_serving} tasks serve, nothing is left over"
        )


def restarts(command: Command, store: Path, sources: Sources, seconds: Sequence[float]) -> Iterator[Restart]:
    """Kill a server after each of these times of load, and check it when it is up again.

    Raises:
        RestartError: the store broke a promise.
    """
    known: list[Upload] = []
    for duration in seconds:
        with serving(command(store)) as (process, ready):
            load = Load(ready["grpc"], sources, known)
            load.run(process, duration)
        known += load.acknowledged
        num_unfinished = len(_unfinished(store))
        with serving(command(store)) as (_, ready), Client(ready["grpc"]) as client:
            whole = check(client, known, load.cut_off)
            check_files(store, len(known) + len(whole))
            for upload in load.cut_off:
                upload.send(client)
            known += load.cut_off
            check(client, known, [])
            yield Restart(
                num_acknowledged=len(load.acknowledged),
                num_cut_off=len(load.cut_off),
                num_answers=load.num_answers,
                num_unfinished=num_unfinished,
                num_serving=len(known),
                num_whole=len(whole),
            )


def check(client: Client, acknowledged: Sequence[Upload], cut_off: Sequence[Upload]) -> list[Upload]:
    """Check that each acknowledged upload serves, and whatever else is there; gives those cut off that are there.

    Raises:
        RestartError: one is missing, is not what was sent, or does not serve.
    """
    digests = {adapter.task_id: adapter.digest for adapter in client.list_adapters()}
    whole = [upload for upload in cut_off if upload.task_id in digests]
    expected = {upload.task_id: upload.digest for upload in (*acknowledged, *whole)}
    _require(digests == expected, f"listed are {sorted(digests)}, expected {sorted(expected)}")
    for task_id, digest in expected.items():
        answer = client.generate("Once", task_id=task_id, max_new_tokens=1)
        _require(answer.adapter is not None and answer.adapter.digest == digest, f"{task_id} does not serve")
    return whole


def check_files(store: Path, num_artifacts: int) -> None:
    """Check that every byte of so many artifacts is there, and nothing besides.

    Raises:
        RestartError: it is not so.
    """
    upkeep = open_store(store, None, create=False, sweep=False)
    verified = [found.status for found in upkeep.verify()]
    _require(verified == ["ok"] * num_artifacts, f"of {num_artifacts} artifacts {verified} were found")
    swept = upkeep.gc(older_than_s=0.0)
    _require(swept.num_artifacts + swept.num_unfinished == 0, f"the start left {swept}")
    _require(_unfinished(store) == [], "the start left scratch files")
    upkeep.close()


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], Mapping[str, str]]]:
    """A server process that is ready, and what its ready line says; killed at the end.

    Raises:
        RuntimeError: it did not start; tells the end of its log.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-2000:]}")
            yield process, json.loads(ready)
        finally:
            process.kill()


def _unfinished(store: Path) -> list[Path]:
    """What is on its way in or out of a store."""
    return [*(store / "scratch").iterdir(), *(store / "staging").iterdir()]


def _require(is_so: bool, complaint: str) -> None:
    if not is_so:
        raise RestartError(complaint)


def serve_command(file: Path, **settings: object) -> Sequence[str]:
    """The server as a user runs it, by default on free ports; writes its settings into a file."""
    content = {"grpc_port": 0, "http_port": 0, "log_format": "json", **settings}
    file.write_text(json.dumps(content))
    return [sys.executable, "-m", "manyhats.cli", "serve", "--config", str(file)]


def describe_model(model: str) -> BaseDescription:
    """What adapters of a model must fit."""
    located = locate_model(model, default_home())
    family = read_family(read_json(located.directory / "config.json"))
    return describe(family, names=located.names, digest="")


def main() -> None:
    """Print a line for each kill, and one for all."""
    parser = argparse.ArgumentParser(prog="python -m restart_under_load", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or directory (%(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times until the kills (%(default)s)")
    options = parser.parse_args()
    source = random.Random(options.seed)
    seconds = [source.uniform(2.0, 6.0) for _ in range(options.kills)]
    done: list[Restart] = []
    with tempfile.TemporaryDirectory(prefix="restart-under-load-") as name:
        root = Path(name)
        sources = Sources(root / "sources", describe_model(options.model))

        def command(store: Path) -> Sequence[str]:
            return serve_command(root / "server.yaml", model=options.model, store=str(store))

        for restart in restarts(command, root / "store", sources, seconds):
            done.append(restart)
            print(f"{len(done)}. {restart}", flush=True)
    acknowledged, cut_off = (sum(r.num_acknowledged for r in done), sum(r.num_cut_off for r in done))
    print(
        f"{len(done)} kills: {acknowledged} uploads acknowledged, {cut_off} cut off and repeated; "
        f"{done[-1].num_serving} of {acknowledged + cut_off} tasks serve, every stored byte has its digest, "
        "nothing is left over"
    )


if __name__ == "__main__":
    main()
