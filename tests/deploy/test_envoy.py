"""A real Envoy, as ``deploy/envoy`` has it, in front of two servers of one store."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from manyhats.client import AsyncClient, Client
from restart_under_load import describe_model
from support.factories.adapters import make_lora
from support.factories.tiny_models import make_checkpoint
from support.harnesses.replica_calls import PROMPT, Callers, callers, version_of
from support.servers.postgres import PostgresServer
from support.servers.replicas import Envoy, Replica

pytestmark = [pytest.mark.deploy, pytest.mark.postgres]

TASKS = [f"task{index:03}" for index in range(200)]
BASE = "tiny-base"
NUM_CALLERS = 8
LARGE_RANK = 1500


@dataclass(frozen=True)
class Cluster:
    """Two servers of one store, with all tasks registered, and Envoy's place."""

    replicas: tuple[Replica, Replica]
    envoy: Envoy
    adapters: Path

    def homes(self, task: str) -> list[float]:
        """How many of a task's calls each replica answered."""
        return [replica.num_calls(task) for replica in self.replicas]

    def num_loads(self) -> float:
        """Of adapters, into the memory of either."""
        name = "manyhats_adapter_load_seconds_count"
        return sum(replica.total(name, tier="host") for replica in self.replicas)

    def restart(self, **changed: object) -> None:
        """Both, with nothing in memory."""
        for replica in self.replicas:
            replica.end()
            replica.start(**changed)
        for replica in self.replicas:
            replica.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("replicas")
    model = make_checkpoint(root / BASE)
    base = describe_model(str(model))
    for seed, task in enumerate([*TASKS, "other", "new"]):
        make_lora(root / "adapters" / task, base, rank=4, seed=seed)
    make_lora(root / "adapters/large", base, rank=LARGE_RANK)
    settings = {
        "model": model,
        "quantization": "none",
        "dtype": "float32",
        "store": root / "store",
        "catalogue": postgres_server.new_database(),
        "adapter_roots": [root / "adapters"],
        "num_threads": 1,
        "kv_cache_bytes": 32 << 20,
        "max_task_labels": 1000,
        "max_adapter_rank": LARGE_RANK,
        "drain_limit_s": 20,
    }
    replicas = (Replica(root / "one", settings), Replica(root / "two", settings))
    found = Cluster(replicas, Envoy(root / "envoy", replicas), root / "adapters")
    try:
        for replica in replicas:  # the first compiles kernels for both
            replica.start()
            replica.wait()
        with Client(replicas[0].grpc) as client:
            for task in TASKS:
                client.register_adapter(task, task)
        yield found
    finally:
        for replica in replicas:
            replica.end()


def zipf(seed: int) -> Iterator[str]:
    """Tasks as they are asked for: the n-th 1/n times as often as the first."""
    source = random.Random(seed)
    shuffled = source.sample(TASKS, len(TASKS))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(TASKS) + 1)))
    while True:
        yield source.choices(shuffled, cum_weights=weights)[0]


async def test_each_task_stays_with_one_replica_however_it_is_named(cluster: Cluster) -> None:
    tasks = TASKS[:40]
    before = {task: cluster.homes(task) for task in tasks}
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        for task in tasks:
            for call in made.each_way():
                assert (await call(task)).error == ""
            for model in (f"{task}@1", f"{BASE}:{task}"):
                version_of(await made.post("/v1/completions", {"model": model, "prompt": PROMPT}))
            headers = {"x-manyhats-task": task}
            version_of(await made.post("/v1/completions", {"model": task, "prompt": PROMPT}, **headers))
            assert (await made.client.tokenize(PROMPT, task_id=task)).ids
            assert (await made.client.activate_adapter(f"{task}@1")).version == 1
            assert (await made.http.post(f"/v1/tasks/{task}@1/activate")).status_code == 200
            assert (await made.http.post(f"/v1/tasks/{task}%401/activate")).status_code == 200
    homes = Counter[int]()
    for task in tasks:
        answered = [after - was for after, was in zip(cluster.homes(task), before[task], strict=True)]
        assert sorted(answered) == [0, 11], task
        homes[answered.index(11)] += 1
    assert min(homes[0], homes[1]) >= 8


async def test_calls_of_the_base_go_to_any_replica(cluster: Cluster) -> None:
    before = cluster.homes("_base")
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        for _ in range(20):
            assert (await made.grpc("")).error == ""
            assert (await made.whole(BASE)).error == ""
    assert all(after - was >= 4 for after, was in zip(cluster.homes("_base"), before, strict=True))


async def test_a_task_that_all_ask_for_is_passed_on_in_part(cluster: Cluster) -> None:
    before = cluster.homes(TASKS[0])
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        outcomes = await asyncio.gather(*(made.grpc(TASKS[0], 200) for _ in range(32)))
    assert [each for each in outcomes if each.error] == []
    less, more = sorted(after - was for after, was in zip(cluster.homes(TASKS[0]), before, strict=True))
    assert 2 <= less < more  # at most 1.5 times its share, which is a half, run at one: three quarters


async def test_the_largest_bodies_pass_and_the_bad_ones_are_refused_by_the_server(cluster: Cluster) -> None:
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        long = {"model": TASKS[0], "prompt": PROMPT, "user": "x" * (4 * 2**20 - 200)}
        assert version_of(await made.post("/v1/completions", long)) == f"{TASKS[0]}@1"
        for model in (
            f"{TASKS[0]}\r\nx-injected: 1",
            "no\nsuch",
            "no such",
            "ö",
            7,
            ["a"],
            {"a": 1},
            None,
        ):
            answer = await made.post("/v1/completions", {"model": model, "prompt": PROMPT})
            assert answer.status_code in ((200,) if model is None else (400, 404)), answer.text
        broken = await made.http.post(
            "/v1/completions", content=b'{"model": ', headers={"content-type": "application/json"}
        )
        assert broken.json()["error"]["code"] == "invalid_value"


async def test_an_upload_passes_whatever_its_size(cluster: Cluster) -> None:
    directory = cluster.adapters / "large"
    files = [("file", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
    assert sum(len(content) for _, (_, content) in files) > 2 * 5_242_880  # what Envoy holds of a call
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        answer = await made.http.put("/v1/tasks/large/upload", files=files)
        assert answer.json()["created"], answer.text
        uploaded = await made.client.upload_adapter("large", directory)
        assert (uploaded.adapter.name, uploaded.created) == ("large@1", False)
        assert (await made.grpc("large")).error == ""
        await made.client.delete_adapter("large", force=True)


async def test_a_registration_at_one_is_served_by_both_within_a_second(cluster: Cluster) -> None:
    async with cluster.envoy.running(base=BASE), AsyncClient(cluster.envoy.target, retries=False) as client:
        await client.register_adapter("new", "new")
        registered_s = time.monotonic()
        for replica in cluster.replicas:
            async with callers(replica.grpc) as direct:
                while (await direct.grpc("new")).error:
                    assert time.monotonic() - registered_s < 1.0
                    await asyncio.sleep(0.01)
        took_s = time.monotonic() - registered_s
        print(f"\nregistered at one, answered by both after {took_s:.2f} s")
        await client.delete_adapter("new", force=True)


async def test_a_share_of_a_task_s_calls_goes_to_another_version(cluster: Cluster) -> None:
    task, said = TASKS[1], f'say {{"model": "{TASKS[1]}"}}'
    async with (
        cluster.envoy.running(base=BASE, canary=f"{{{task} = {{version = 2, share = 0.25}}}}"),
        callers(cluster.envoy.target) as made,
    ):
        await made.client.register_adapter(task, "other", activate=False)
        before = cluster.homes(task)
        counts = Counter([version_of(await completed(made, task, PROMPT)) for _ in range(200)])
        assert 25 <= counts[f"{task}@2"] <= 80
        assert counts.keys() == {f"{task}@1", f"{task}@2"}
        answered = [after - was for after, was in zip(cluster.homes(task), before, strict=True)]
        assert sorted(answered) == [0, 200]  # both versions at one replica
        # Only the model's name is changed, not what is quoted in a text ...
        answers = [await completed(made, task, said, echo=True) for _ in range(40)]
        assert set(map(version_of, answers)) == counts.keys()
        assert all(each.json()["choices"][0]["text"].startswith(said) for each in answers)
        # ... and nothing where something else looks like it.
        unclear = [await completed(made, task, PROMPT, metadata={"model": task}) for _ in range(20)]
        assert set(map(version_of, unclear)) == {f"{task}@1"}
        # The rest of the way, and back.
        for version in (2, 1):
            await made.client.activate_adapter(f"{task}@{version}")
            answer = await made.client.generate(PROMPT, task_id=task, max_new_tokens=1)
            assert answer.adapter is not None
            assert answer.adapter.version == version
        await made.client.delete_adapter(f"{task}@2", force=True)


async def completed(made: Callers, model: str, prompt: str, **fields: object) -> httpx2.Response:
    return await made.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 1, **fields})


async def test_a_replica_that_dies_loses_its_streams_only_and_gets_its_tasks_back(cluster: Cluster) -> None:
    one, _ = cluster.replicas
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        home = [task for task in TASKS[:20] if await is_answered_by(made, task, one)]
        assert home
        until_s = time.monotonic() + 8.0
        load = asyncio.create_task(
            made.load(zipf(1), NUM_CALLERS, 32, lambda num_made: time.monotonic() > until_s)
        )
        await asyncio.sleep(3.0)
        await asyncio.to_thread(one.end, signal.SIGKILL)
        outcomes = await load
        one.start()
        await asyncio.to_thread(one.wait)
        ready_s = time.monotonic()
        while not all([await is_answered_by(made, task, one) for task in home]):
            assert time.monotonic() - ready_s < 10.0
        back_s = time.monotonic() - ready_s
    lost = [each for each in outcomes if each.error]
    assert [each for each in lost if not each.begun] == []
    assert {each.way for each in lost} <= {"grpc_stream", "http_stream"}
    assert len(lost) <= NUM_CALLERS
    assert len(outcomes) > 50
    print(
        f"\n{len(outcomes)} calls beside a kill: {len(lost)} streams ended, all others were answered; "
        f"its tasks were back {back_s:.1f} s after it was ready"
    )


async def is_answered_by(made: Callers, task: str, replica: Replica) -> bool:
    before = await asyncio.to_thread(replica.num_calls, task)
    assert (await made.grpc(task)).error == ""
    return await asyncio.to_thread(replica.num_calls, task) > before


async def test_a_replica_that_is_stopped_under_load_loses_nothing(cluster: Cluster) -> None:
    _, two = cluster.replicas
    async with cluster.envoy.running(base=BASE), callers(cluster.envoy.target) as made:
        until_s = time.monotonic() + 8.0
        load = asyncio.create_task(
            made.load(zipf(2), NUM_CALLERS, 32, lambda num_made: time.monotonic() > until_s)
        )
        await asyncio.sleep(3.0)
        await asyncio.to_thread(two.end, signal.SIGTERM)
        outcomes = await load
    two.start()
    await asyncio.to_thread(two.wait)
    assert [each for each in outcomes if each.error] == []
    assert len(outcomes) > 50


async def test_adapters_are_loaded_half_as_often_as_by_chance_at_most(cluster: Cluster) -> None:
    """Each replica has room for half of the tasks, and none in memory at first."""
    (one, _), num_calls = cluster.replicas, 6000
    cluster.restart()
    async with callers(one.grpc) as made:
        for task in TASKS[:10]:
            assert (await made.grpc(task)).error == ""
    per_adapter = one.total("manyhats_model_bytes", part="adapters") / 10
    loads = {}
    for lb_policy in ("", "RANDOM"):
        cluster.restart(adapter_memory_bytes=int(per_adapter * len(TASKS) / 2))
        async with (
            cluster.envoy.running(base=BASE, lb_policy=lb_policy),
            callers(cluster.envoy.target) as made,
        ):
            outcomes = await made.load(zipf(3), NUM_CALLERS, 1, lambda num_made: num_made >= num_calls)
        assert [each for each in outcomes if each.error] == []
        loads[lb_policy] = cluster.num_loads()
    print(
        f"\n{num_calls} calls of {len(TASKS)} tasks by Zipf's law, room for {len(TASKS) // 2} at each of 2 replicas: "
        f"{loads['']:g} loads, {loads['RANDOM']:g} by chance: {loads[''] / loads['RANDOM']:.2f} times"
    )
    assert loads[""] <= 0.5 * loads["RANDOM"]
    cluster.restart()
