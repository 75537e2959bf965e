"""A server whose store is lost serves what is in memory, has callers try the rest again, and recovers."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_status import rpc_status

from manyhats.adapters.disk import file_lock
from manyhats.adapters.store.artifacts import local
from manyhats.engine.progress import no_progress
from manyhats.server.grpc.port import STORE, GrpcPort
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.http.port import HttpPort
from manyhats.server.lifetime.config_file import make_config
from manyhats.server.lifetime.serving import running
from manyhats.server.lifetime.wiring import open_backend
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.backend import Backend
from manyhats.server.service.call import Calls
from manyhats.server.service.following import StoreFollower
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import Registrations
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.factories.adapters import make_lora
from support.factories.tiny_models import make_checkpoint
from support.fakes.server import refused
from support.harnesses.engine import load_tiny, until
from support.servers.postgres import PostgresServer

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
HANG_S = 0.5


@dataclass(frozen=True)
class Home:
    """A base, and adapters on it to register."""

    base: Path
    sources: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    directory = tmp_path_factory.mktemp("lost")
    base = make_checkpoint(directory / "base", seed=5)
    description = load_tiny(base).description
    for seed, name in enumerate(("resident", "cold", "new", "other")):
        make_lora(directory / "sources" / name, description, seed=seed)
    return Home(base, directory / "sources")


@dataclass
class Server:
    """One on ports of its own, that follows its store as a process does."""

    backend: Backend
    metrics: Metrics
    home: Home
    http: str
    health: Any
    generation: Any
    adapters: Any

    async def register(self, task_id: str) -> Any:
        request = pb.RegisterAdapterRequest(task_id=task_id, uri=str(self.home.sources / task_id))
        return await self.adapters.RegisterAdapter(request, timeout=20)

    async def answer(self, task_id: str) -> Any:
        stopping = generation_pb2.StoppingParams(max_new_tokens=4)
        request = generation_pb2.GenerateRequest(task_id=task_id, text="hello", stopping=stopping)
        return await self.generation.Generate(request, timeout=20)

    async def is_serving(self, service: str = "") -> bool:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == SERVING)

    def usable(self) -> dict[str, bool]:
        value = self.metrics.registry.get_sample_value
        uses = ("catalogue", "read", "write")
        return {use: value("manyhats_store_usable", {"use": use}) == 1.0 for use in uses}

    async def storez(self) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://{self.http}/storez", timeout=10) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(ask)

    def evict(self, task_id: str) -> None:
        self.backend.engine.forget_adapter(self.backend.store.resolve(task_id).digest)

    async def becomes(self, **usable: bool) -> None:
        await until(lambda: self.usable() == {"catalogue": True, "read": True, "write": True, **usable})

    async def assert_only_memory_serves(self) -> None:
        """What is loaded answers; the rest is refused so that callers know to try again."""
        assert (await self.answer("resident")).text is not None
        assert (await self.answer("")).text is not None
        assert await self.is_serving()
        await self.assert_to_be_tried_again(self.answer("cold"))
        await self.assert_to_be_tried_again(self.register("new"))

    async def assert_to_be_tried_again(self, call: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 15)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value.details()
        status = rpc_status.from_call(caught.value)
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)
        assert "STORE_UNAVAILABLE" in str(status)

    async def assert_all_serves(self) -> None:
        await self.becomes()
        await until_serving(self)
        assert await self.storez() == (200, "ok\n")
        assert (await self.answer("cold")).adapter.version == 1
        self.evict("cold")
        assert (await self.register("new")).adapter.version == 1
        assert (await self.answer("new")).adapter.version == 1


async def until_serving(server: Server, *, is_serving: bool = True) -> None:
    async with asyncio.timeout(10):
        while await server.is_serving(STORE) is not is_serving:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@asynccontextmanager
async def server(home: Home, store: Path, catalogue: str = "") -> AsyncIterator[Server]:
    config = make_config(
        {
            "model": str(home.base),
            "store": store,
            "catalogue": catalogue,
            "adapter_roots": (home.sources,),
            "dtype": "float32",
            "quantization": "none",
            "num_threads": 1,
            "kv_cache_bytes": 4 << 20,
        }
    )
    metrics, gate = Metrics(max_task_labels=10), Gate(heartbeat_limit_s=60.0)
    backend = await asyncio.to_thread(open_backend, config, metrics, no_progress)
    await backend.engine.start()
    registrations = Registrations(backend, metrics)
    metrics.attach(backend)
    gate.open(backend)
    calls = Calls(gate, metrics)
    port = GrpcPort(calls, host="127.0.0.1", port=0)
    around = Surroundings(calls=calls, answers=Answers(unread_limit_s=60.0))
    http = HttpPort(make_app(around), host="127.0.0.1", port=0)
    follower = StoreFollower(backend, registrations, period_s=0.05, check_s=0.05, hang_s=HANG_S)
    try:
        await port.start()
        await http.start()
        with running(port.health.follow_until_dead()), running(follower.follow()):
            async with grpc.aio.insecure_channel(port.address) as channel:
                yield Server(
                    backend,
                    metrics,
                    home,
                    http.address,
                    health_pb2_grpc.HealthStub(channel),
                    GenerationServiceStub(channel),
                    AdapterServiceStub(channel),
                )
    finally:
        await port.stop(0.0)
        await http.stop(0.0)
        await backend.engine.stop(0.0)
        backend.store.close()


@asynccontextmanager
async def with_tasks(home: Home, store: Path, catalogue: str = "") -> AsyncIterator[Server]:
    """Two tasks, of which one is in memory."""
    async with server(home, store, catalogue) as serving:
        for task_id in ("resident", "cold"):
            await serving.register(task_id)
        serving.evict("cold")
        await serving.becomes()
        yield serving


async def test_a_directory_that_is_gone_and_comes_back(home: Home, tmp_path: Path) -> None:
    store = tmp_path / "store"
    async with with_tasks(home, store) as serving:
        store.rename(tmp_path / "elsewhere")
        await serving.becomes(catalogue=False, read=False, write=False)
        await until_serving(serving, is_serving=False)
        status, text = await serving.storez()
        assert status == 503
        assert "read: store: its directory is not there" in text
        await serving.assert_only_memory_serves()
        store.mkdir()  # as where a file system would be mounted
        await asyncio.sleep(0.2)
        assert list(store.iterdir()) == [], "nothing is made there"
        await serving.assert_only_memory_serves()
        store.rmdir()
        (tmp_path / "elsewhere").rename(store)
        await serving.assert_all_serves()


async def test_a_copy_in_its_place_is_followed_with_what_others_changed_there(
    home: Home, tmp_path: Path
) -> None:
    """Connections to the file that was deleted would go on with it, and lose what is registered."""
    store, copy = tmp_path / "store", tmp_path / "copy"
    async with with_tasks(home, store) as serving:
        store.rename(copy)
        await serving.becomes(catalogue=False, read=False, write=False)
        await asyncio.to_thread(shell, "cp", "-a", copy, tmp_path / "other")
        async with server(home, tmp_path / "other") as other:
            await other.register("other")
        (tmp_path / "other").rename(store)
        await serving.assert_all_serves()
        assert (await serving.answer("other")).adapter.version == 1
        async with server(home, store) as again:
            assert (await again.answer("new")).adapter.version == 1


@contextmanager
def opens_fail(monkeypatch: pytest.MonkeyPatch, number: int, *, is_for_writing: bool) -> Iterator[None]:
    """Each ``os.open`` of the store fails as if its file system had this fault."""
    real = os.open

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if not is_for_writing or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        for module in (local, file_lock):
            patch.setattr(module, "os", _Os(opened))
        yield


class _Os:
    """The module ``os``, but for one function."""

    def __init__(self, opened: Callable[..., int]) -> None:
        self.open = opened

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


async def test_a_read_only_directory_still_gives_what_it_has(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_tasks(home, tmp_path / "store") as serving:
        with opens_fail(monkeypatch, errno.EROFS, is_for_writing=True):
            await serving.becomes(write=False)
            await until_serving(serving, is_serving=False)
            assert (await serving.answer("cold")).adapter.version == 1
            serving.evict("cold")
            await serving.assert_to_be_tried_again(serving.register("new"))
            assert "Read-only file system" in (await serving.storez())[1]
        await serving.assert_all_serves()


async def test_a_directory_that_cannot_be_read(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_tasks(home, tmp_path / "store") as serving:
        with opens_fail(monkeypatch, errno.EIO, is_for_writing=False):
            await serving.becomes(write=False)
            await serving.assert_only_memory_serves()
        await serving.assert_all_serves()


def fill(file: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(bytes(8 << 20))


def shell(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "manyhats-test", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        yield directory
    finally:
        shell("umount", "--lazy", directory)


async def test_a_full_disk_refuses_new_versions_alone(home: Home, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        async with with_tasks(home, disk / "store") as serving:
            filler = disk / "filler"
            await asyncio.to_thread(fill, filler)
            await serving.becomes(write=False)
            await until_serving(serving, is_serving=False)
            assert (await serving.answer("cold")).adapter.version == 1
            serving.evict("cold")
            refusal = await refused(serving.register("new"))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
            filler.unlink()
            await serving.assert_all_serves()


async def test_a_disk_that_is_unmounted_and_mounted_again(home: Home, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        async with with_tasks(home, disk / "store") as serving:
            shell("mount", "--make-private", disk)
            (tmp_path / "kept").mkdir()
            shell("mount", "--bind", disk, tmp_path / "kept")
            try:
                shell("umount", "--lazy", disk)
                await serving.becomes(catalogue=False, read=False, write=False)
                await serving.assert_only_memory_serves()
                assert list(disk.iterdir()) == []
                shell("mount", "--bind", tmp_path / "kept", disk)
                await serving.assert_all_serves()
            finally:
                shell("umount", "--lazy", tmp_path / "kept")


async def test_reads_that_hang_hold_up_neither_others_nor_the_event_loop(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def hanging(*_: Any, **__: Any) -> int:
        goes_on.wait()
        raise OSError(errno.EIO, "after all")

    async with with_tasks(home, tmp_path / "store") as serving:
        try:
            with monkeypatch.context() as patch:
                for module in (local, file_lock):
                    patch.setattr(module, "os", _Os(hanging))
                patch.setattr(local.LocalArtifacts, "check_reads", lambda self: hanging())
                cold = asyncio.create_task(serving.answer("cold"))
                register = asyncio.create_task(serving.register("new"))
                await serving.becomes(read=False, write=False)
                await until_serving(serving, is_serving=False)
                for waiting in (cold, register):  # they began before anybody knew
                    await serving.assert_to_be_tried_again(waiting)
                await serving.assert_only_memory_serves()
        finally:
            goes_on.set()
        await serving.assert_all_serves()


@pytest.mark.postgres
async def test_a_database_that_is_down(home: Home, tmp_path: Path, postgres_server: PostgresServer) -> None:
    """Artifacts can still be read, so that nothing but changes is refused."""
    url = postgres_server.new_database()
    async with with_tasks(home, tmp_path / "store", url) as serving:
        with postgres_server.stopped():
            await serving.becomes(catalogue=False)
            await until_serving(serving, is_serving=False)
            assert (await serving.answer("cold")).adapter.version == 1
            serving.evict("cold")
            await serving.assert_to_be_tried_again(serving.register("new"))
            assert await serving.is_serving()
        await serving.assert_all_serves()


@pytest.mark.postgres
async def test_a_database_that_hangs_and_what_others_changed_meanwhile(
    home: Home, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    url = postgres_server.new_database()
    async with with_tasks(home, tmp_path / "store", url) as serving:
        with postgres_server.suspended():
            register = asyncio.create_task(serving.register("new"))
            await serving.becomes(catalogue=False)
            await until_serving(serving, is_serving=False)
            await serving.assert_to_be_tried_again(register)
            await serving.assert_to_be_tried_again(serving.register("new"))
            for _ in range(3):
                assert (await serving.answer("cold")).adapter.version == 1
                serving.evict("cold")
            assert await serving.is_serving()
        await serving.becomes()
        async with server(home, tmp_path / "store", url) as other:
            await other.register("other")
            await until(lambda: serving.backend.store.list(task_id="other").records != ())
        assert (await serving.answer("other")).adapter.version == 1
        await serving.assert_all_serves()
