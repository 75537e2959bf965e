"""A real Ray Serve, as ``deploy/ray`` has it, with two replicas on one store."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
import yaml

from manyhats.client import AsyncClient, ManyhatsError
from manyhats.server.access.tokens import new_token
from manyhats.server.lifetime.config_file import make_config
from restart_under_load import describe_model
from support.factories.adapters import make_lora
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine_server import served_ports
from support.harnesses.ray_cluster import (
    MODEL_KEY,
    PROMPT,
    TASKS,
    Cluster,
    Load,
    answers,
    register_all,
    token_entries,
    until,
)
from support.servers.ray_serve import NUM_REPLICAS, running_ray

pytestmark = pytest.mark.deploy

NUM_CALLERS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("ray")
    model = make_checkpoint(root / "tiny-base")
    base = describe_model(str(model))
    for seed, task in enumerate([*TASKS, "late", "sent"]):
        make_lora(root / "adapters" / task, base, rank=4, seed=seed)
    tokens = {"ops": new_token(), "one": new_token()}
    (root / "tokens.yaml").write_text(yaml.safe_dump(token_entries(tokens)))
    (root / "tokens.yaml").chmod(0o600)
    settings = {
        "model": str(model),
        "quantization": "none",
        "dtype": "float32",
        "store": str(root / "store"),
        "adapter_roots": [str(root / "adapters")],
        "token_file": str(root / "tokens.yaml"),
        "num_threads": 1,
        "max_sequences": 16,
        "kv_cache_bytes": 32 << 20,
        "adapter_memory_bytes": 4 << 20,
        "max_versions_per_task": 1,
    }
    with running_ray(root, settings) as serve:
        found = Cluster(serve, settings, tokens)
        asyncio.run(register_all(found))
        yield found


async def test_answers_are_those_of_a_plain_server(cluster: Cluster) -> None:
    plain = make_config({**cluster.settings, "token_file": None})
    asked = [(task, seed) for task in ("", *TASKS[:5]) for seed in (None, 7)]
    async with (
        served_ports(plain) as ports,
        AsyncClient(ports.grpc) as expected,
        cluster.client() as client,
        cluster.http() as http,
        httpx2.AsyncClient(base_url=f"http://{ports.http}", timeout=60) as plain_http,
    ):
        for task, seed in asked:
            options: Any = {"task_id": task, "max_new_tokens": 24}
            if seed is not None:
                options |= {"temperature": 1.0, "seed": seed}
            one = await expected.generate(PROMPT, **options)
            assert (await client.generate(PROMPT, **options)).tokens == one.tokens
            pieces = [each async for each in client.generate_stream(PROMPT, **options)]
            assert "".join(each.text for each in pieces) == one.text
        for task in TASKS[:3]:
            for path, body in (
                ("/v1/completions", {"prompt": PROMPT}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
            ):
                named = {"model": task, "max_tokens": 12, "temperature": 0, **body}
                both = [(await each.post(path, json=named)).json() for each in (http, plain_http)]
                assert both[0]["choices"] == both[1]["choices"]
                answer = await http.post(path, json={**named, "stream": True})
                events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
                assert events[-1] == "[DONE]"
                choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
                texts = [each.get("text") or each.get("delta", {}).get("content") or "" for each in choices]
                (choice,) = both[1]["choices"]
                assert "".join(texts) == (choice.get("text") or choice["message"]["content"])
        models = [each["id"] for each in (await http.get("/v1/models")).json()["data"]]
        assert set(TASKS) < set(models)
        missing = await http.post("/v1/completions", json={"model": "nope", "prompt": PROMPT})
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_a_call_costs_little_more_than_at_a_plain_server(cluster: Cluster) -> None:
    took: dict[str, list[float]] = {"ray": [], "plain": []}
    async with (
        served_ports(make_config({**cluster.settings, "token_file": None})) as ports,
        AsyncClient(ports.grpc) as plain,
        cluster.client() as client,
    ):
        for _ in range(60):
            for name, each in (("ray", client), ("plain", plain)):
                begin_s = time.perf_counter()
                await each.generate(PROMPT, task_id=TASKS[0], max_new_tokens=2, ignore_eos=True)
                took[name].append(time.perf_counter() - begin_s)
    medians_ms = {name: round(1000 * statistics.median(times), 1) for name, times in took.items()}
    print(f"medians of a call of two tokens, in ms: {medians_ms}")
    assert medians_ms["ray"] < medians_ms["plain"] + 100  # on a machine with other work


async def test_each_task_stays_with_one_replica_over_grpc_and_http(cluster: Cluster) -> None:
    tasks, rounds = TASKS[20:60], 5
    async with cluster.client() as client, cluster.http() as http:
        for task in tasks:
            await client.tokenize(PROMPT, task_id=task)  # takes its place
        await asyncio.sleep(1)  # each replica tells Serve every 0.1 s what it has
        for _ in range(rounds):
            await asyncio.gather(*(client.generate(PROMPT, task_id=task, max_new_tokens=2) for task in tasks))
            for task in tasks[:10]:
                body = {"model": task, "prompt": PROMPT, "max_tokens": 2}
                headers = {"serve_multiplexed_model_id": task}
                assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
    for method, called in (("Generate", tasks), ("Completions", tasks[:10])):
        homes = cluster.serve.wait_for_calls(rounds * len(called), method, set(called))
        assert all(len(home) == 1 for home in homes.values()), homes
    both = cluster.serve.wait_for_calls(rounds * len(tasks), "Generate", set(tasks))
    assert len({pid for home in both.values() for pid in home}) == NUM_REPLICAS


def zipf(seed: int) -> Iterator[str]:
    """Tasks as they are asked for: the n-th 1/n times as often as the first."""
    source = random.Random(seed)
    shuffled = source.sample(TASKS, len(TASKS))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(TASKS) + 1)))
    while True:
        yield source.choices(shuffled, cum_weights=weights)[0]


async def num_loads(cluster: Cluster, num_calls: int, seed: int, **metadata: str) -> float:
    """How many of these calls waited for an adapter."""
    tasks, loads = zipf(seed), 0

    async def call() -> None:
        nonlocal loads
        for task in itertools.islice(tasks, num_calls // NUM_CALLERS):
            told = metadata or {"x-manyhats-task": task}
            response = await answers(cluster, task, **told)
            loads += response.usage.adapter_load_ms > 0

    await asyncio.gather(*(call() for _ in range(NUM_CALLERS)))
    return loads


async def test_affinity_loads_half_as_many_adapters_as_random_routing(cluster: Cluster) -> None:
    loads = {}
    for name, metadata in (("affinity", {}), ("random", {MODEL_KEY: ""})):
        await num_loads(cluster, 800, seed=1, **metadata)
        loads[name] = await num_loads(cluster, 800, seed=2, **metadata)
    print(f"loads of 800 calls: {loads}")
    assert loads["random"] > 40
    assert loads["affinity"] <= 0.5 * loads["random"]


async def test_a_registration_at_one_replica_is_served_by_both_within_a_second(cluster: Cluster) -> None:
    async with cluster.client() as client:
        await client.register_adapter("late", "late")
        begin_s, last_failure_s, codes = time.monotonic(), 0.0, set()
        while time.monotonic() < begin_s + 3:
            try:
                await answers(cluster, "late", **{MODEL_KEY: ""})
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
                last_failure_s = time.monotonic() - begin_s
        assert codes <= {grpc.StatusCode.NOT_FOUND}
        print(f"not found for {last_failure_s:.2f} s")
        assert last_failure_s < 1
        (home,) = cluster.serve.wait_for_calls(5, "Generate", {"late"}).values()
        assert len(home) == NUM_REPLICAS
        await client.delete_adapter("late")
        sent = await client.upload_adapter("sent", Path(cluster.settings["adapter_roots"][0]) / "sent")
        assert sent.created
        await client.delete_adapter("sent")


async def test_statuses_and_their_details_arrive(cluster: Cluster) -> None:
    async with cluster.client() as client, cluster.client("one") as other:
        for call in (client.generate, first_piece(client)):
            with pytest.raises(ManyhatsError) as caught:
                await call(PROMPT, task_id="nope")
            assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "TASK_NOT_FOUND")
            with pytest.raises(ManyhatsError, match="temperature") as caught:
                await call(PROMPT, temperature=-1.0)
            assert caught.value.code == "INVALID_ARGUMENT"
        assert (await other.generate(PROMPT, task_id=TASKS[0], max_new_tokens=1)).tokens
        for call in (other.generate, first_piece(other)):
            with pytest.raises(ManyhatsError) as caught:
                await call(PROMPT, task_id=TASKS[1])
            assert caught.value.code == "PERMISSION_DENIED"
    async with cluster.client(retries=False) as client:
        with pytest.raises(ManyhatsError) as caught:
            await client.register_adapter(TASKS[0], TASKS[1])
        assert caught.value.code == "RESOURCE_EXHAUSTED"
    async with AsyncClient(cluster.serve.grpc, retries=False) as nobody:
        with pytest.raises(ManyhatsError) as caught:
            await nobody.generate(PROMPT)
        assert caught.value.code == "UNAUTHENTICATED"
        await nobody.wait_ready(10)  # a probe needs no token


def first_piece(client: AsyncClient) -> Any:
    async def call(*args: Any, **options: Any) -> Any:
        async for piece in client.generate_stream(*args, **options):
            return piece
        return None

    return call


async def test_cancelled_and_late_calls_end_in_the_replica(cluster: Cluster) -> None:
    options: Any = {"task_id": TASKS[3], "max_new_tokens": 400, "ignore_eos": True}
    async with cluster.client() as client:
        await client.generate(PROMPT, task_id=TASKS[3], max_new_tokens=1)
        await asyncio.sleep(0.5)

        async def leave(index: int) -> None:
            async for _ in client.generate_stream(PROMPT, **options):
                if index == 0:
                    return
                index -= 1

        await asyncio.gather(*(leave(index % 4) for index in range(40)))
        await until_idle(cluster, TASKS[3])
        for late in (client.generate, first_piece(client)):
            with pytest.raises(ManyhatsError) as caught:
                await late(PROMPT, **{**options, "max_new_tokens": 500}, timeout_s=0.01)
            assert caught.value.code == "DEADLINE_EXCEEDED"
        await until_idle(cluster, TASKS[3])


async def until_idle(cluster: Cluster, task: str) -> None:
    """Wait until the replica that has a task runs nothing, for less time than the calls would take."""
    end_s = time.monotonic() + 2
    while not re.search(
        r"^manyhats_requests_running(\{.*\})? 0\.0$", await cluster.metrics(task), re.MULTILINE
    ):
        assert time.monotonic() < end_s
        await asyncio.sleep(0.05)


async def test_calls_of_a_replica_that_is_killed_are_answered_by_the_other(cluster: Cluster) -> None:
    num_starts, load = cluster.serve.num_starts(), Load(cluster, retries=True)
    async with load.running():
        num_ended, kill_s = len(load.ended), time.monotonic()
        cluster.serve.replicas()[0].kill()
        await until(lambda: len(load.ended) >= num_ended + 100)
        print(f"100 calls in {time.monotonic() - kill_s:.1f} s; failed: {load.errors()}")
    assert [each for each in load.errors() if not each[1]] == []
    assert all(error.startswith("UNAVAILABLE") for error, _ in load.errors())
    await asyncio.to_thread(cluster.serve.wait_until_ready, num_starts + 1)  # Serve has started another


async def test_a_replica_that_is_no_longer_wanted_ends_its_calls_first(cluster: Cluster) -> None:
    await until(lambda: len(cluster.serve.replicas()) == NUM_REPLICAS)
    load = Load(cluster, retries=False)
    async with load.running():
        await asyncio.to_thread(cluster.serve.deploy, 1)
        await until(lambda: len(cluster.serve.replicas()) == 1)
    assert load.errors() == []


async def test_a_replica_is_added_where_one_has_too_much_to_do(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.serve.deploy, 1)
    await until(lambda: len(cluster.serve.replicas()) == 1)
    num_starts, load = cluster.serve.num_starts(), Load(cluster, retries=False)
    async with load.running():
        scaling = {"target_ongoing_requests": 2, "upscale_delay_s": 1}
        await asyncio.to_thread(cluster.serve.deploy, 1, NUM_REPLICAS, **scaling)
        await asyncio.to_thread(cluster.serve.wait_until_ready, num_starts + 1)
        num_ended = len(load.ended)
        await until(lambda: len(load.ended) >= num_ended + 50)
    assert len(cluster.serve.replicas()) == NUM_REPLICAS
    assert load.errors() == []
