"""A server process that is killed, in whatever it does, and started again on the same store."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from restart_under_load import Sources, restarts
from support.factories.adapters import make_base, make_lora

CHILD = """
import asyncio, sys
from pathlib import Path
from support.factories.adapters import make_base
from manyhats.adapters.store.opening import open_store
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.process import serve
from support.fakes.server import EchoEngine, make_backend

directory = Path(sys.argv[1])
config = ServeConfig(model="echo", store=directory, grpc_port=0, http_port=0, log_format="json")
store = open_store(directory, make_base(), [directory.parent])
backend = make_backend(EchoEngine(), store)
sys.exit(asyncio.run(serve(config, assemble=lambda config, metrics, progress: backend)))
"""
PYTHONPATH = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
BASE = make_base()


@contextmanager
def server(store: Path) -> Iterator[tuple[subprocess.Popen[str], grpc.Channel]]:
    """A server process on a store, and a channel to it; killed at the end."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(store)]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=null, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["grpc"]
            with grpc.insecure_channel(address) as channel:
                yield process, channel
        finally:
            process.kill()


def register(channel: grpc.Channel, source: Path) -> pb.Adapter:
    request = pb.RegisterAdapterRequest(task_id="hats", uri=str(source))
    answer: pb.RegisterAdapterResponse = AdapterServiceStub(channel).RegisterAdapter(request)
    return answer.adapter


def answering(channel: grpc.Channel) -> tuple[int, str]:
    """Version and digest of what answers for the task."""
    request = generation_pb2.GenerateRequest(task_id="hats", text="a")
    adapter = GenerationServiceStub(channel).Generate(request).adapter
    return adapter.version, adapter.digest


def listed(channel: grpc.Channel) -> list[Any]:
    return list(AdapterServiceStub(channel).ListAdapters(pb.ListAdaptersRequest()).adapters)


def test_killed_server_has_its_tasks_after_a_restart(tmp_path: Path) -> None:
    sources = [make_lora(tmp_path / name, BASE, seed=seed) for seed, name in enumerate("ab")]
    with server(tmp_path / "store") as (process, channel):
        first, second = (register(channel, source) for source in sources)
        AdapterServiceStub(channel).ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        AdapterServiceStub(channel).PinAdapter(pb.PinAdapterRequest(task_id="hats"))
        process.send_signal(signal.SIGKILL)
    with server(tmp_path / "store") as (process, channel):
        assert [(each.version, each.digest) for each in listed(channel)] == [
            (1, first.digest),
            (2, second.digest),
        ]
        where = [(each.pinned, each.residency) for each in listed(channel)]
        assert where == [(True, pb.ADAPTER_RESIDENCY_DEVICE), (False, pb.ADAPTER_RESIDENCY_DISK)]
        assert answering(channel) == (1, first.digest)
        assert register(channel, sources[1]).version == 2
        assert answering(channel) == (2, second.digest)


def test_upload_cut_off_by_a_kill_leaves_nothing_after_a_restart(tmp_path: Path) -> None:
    store, data = tmp_path / "store", bytes(200_000)
    file = pb.FileInfo(
        name="adapter_model.safetensors", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    config = pb.FileInfo(name="adapter_config.json", size_bytes=2, sha256=hashlib.sha256(b"{}").hexdigest())

    with server(store) as (process, channel):

        def messages() -> Iterator[pb.UploadAdapterRequest]:
            header = pb.UploadHeader(task_id="hats", files=[config, file])
            yield pb.UploadAdapterRequest(header=header)
            yield pb.UploadAdapterRequest(chunk=pb.FileChunk(file_index=1, data=data[:100_000]))
            process.wait()

        call = AdapterServiceStub(channel).UploadAdapter.future(messages())
        assert call.initial_metadata() is not None  # the header is taken, and its files are made
        assert len(list((store / "scratch").rglob("adapter_*"))) == 2
        process.send_signal(signal.SIGKILL)
        assert call.exception() is not None
    with server(store) as (process, channel):
        assert listed(channel) == []
        assert list((store / "scratch").iterdir()) == []


def test_kills_amid_uploads_and_requests_lose_nothing_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sources = Sources(tmp_path / "sources", BASE)
    found = list(
        restarts(
            lambda store: [sys.executable, "-c", CHILD, str(store)], tmp_path / "store", sources, [0.2, 0.4]
        )
    )
    assert sum(each.num_acknowledged for each in found) > 0
    num_uploads = sum(each.num_acknowledged + each.num_cut_off for each in found)
    assert found[-1].num_serving == num_uploads
