"""Replicas behind a real Ray Serve, with tasks, callers and load."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx2
import openai

from manyhats.client import AsyncClient, Credentials, ManyhatsError
from manyhats.v1 import generation_pb2
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.servers.ray_serve import RayServe

TASKS = [f"task{index:03}" for index in range(200)]
PROMPT = "ab"
MODEL_KEY = "multiplexed_model_id"


@dataclass(frozen=True)
class Cluster:
    """Two replicas, with all tasks registered.

    Attributes:
        settings: of each.
        tokens: caller → token: of one who may do everything, and of one who may call one task.
    """

    serve: RayServe
    settings: dict[str, Any]
    tokens: dict[str, str]

    @asynccontextmanager
    async def client(self, caller: str = "ops", **options: Any) -> AsyncIterator[AsyncClient]:
        credentials = Credentials(token=self.tokens[caller])
        async with AsyncClient(self.serve.grpc, timeout_s=60, credentials=credentials, **options) as client:
            yield client

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx2.AsyncClient]:
        headers = {"authorization": f"Bearer {self.tokens['ops']}"}
        base = f"http://{self.serve.http}"
        async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=60) as client:
            yield client

    async def metrics(self, task: str) -> str:
        """Of the replica that has a task."""
        async with self.http() as http:
            answer = await http.get("/metrics", headers={"serve_multiplexed_model_id": task})
            return answer.text


def token_entries(tokens: dict[str, str]) -> list[dict[str, object]]:
    digests = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in tokens.items()}
    return [
        {"name": "ops", "sha256": digests["ops"], "roles": ["generate", "manage"]},
        {"name": "one", "sha256": digests["one"], "roles": ["generate"], "tasks": [TASKS[0]]},
    ]


async def register_all(cluster: Cluster) -> None:
    async with cluster.client() as client:
        await client.wait_ready(60)
        for task in TASKS:
            await client.register_adapter(task, task)


async def answers(cluster: Cluster, task: str, **metadata: str) -> generation_pb2.GenerateResponse:
    """A call that carries what is given, and no task but the message's."""
    authorization = ("authorization", f"Bearer {cluster.tokens['ops']}")
    async with grpc.aio.insecure_channel(cluster.serve.grpc) as channel:
        stopping = generation_pb2.StoppingParams(max_new_tokens=4)
        request = generation_pb2.GenerateRequest(text=PROMPT, task_id=task, stopping=stopping)
        stub: Any = GenerationServiceStub(channel)
        found: generation_pb2.GenerateResponse = await stub.Generate(
            request, metadata=(authorization, *metadata.items())
        )
        return found


@dataclass
class Load:
    """Calls without pause: unary ones, streams and those of OpenAI's client in turn.

    Attributes:
        ended: "" or the error of each, and whether a part of a stream had come.
    """

    cluster: Cluster
    retries: bool
    ended: list[tuple[str, bool]] = field(default_factory=list)
    is_over: bool = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        http = openai.AsyncOpenAI(
            base_url=f"http://{self.cluster.serve.http}/v1",
            api_key=self.cluster.tokens["ops"],
            max_retries=2 if self.retries else 0,
        )
        async with self.cluster.client(retries=self.retries) as client, http:
            calling = [asyncio.create_task(self._call(client, http, number)) for number in range(9)]
            await until(lambda: len(self.ended) >= 50)
            yield
            self.is_over = True
            await asyncio.gather(*calling)

    async def _call(self, client: AsyncClient, http: openai.AsyncOpenAI, number: int) -> None:
        options: Any = {"max_new_tokens": 16, "ignore_eos": True}
        for index in itertools.count(number):
            if self.is_over:
                return
            task, has_begun = TASKS[index % 40], False
            try:
                if index % 3 == 0:
                    await client.generate(PROMPT, task_id=task, **options)
                elif index % 3 == 1:
                    headers = {"serve_multiplexed_model_id": task}
                    await http.completions.create(model=task, prompt=PROMPT, extra_headers=headers)
                else:
                    async for _ in client.generate_stream(PROMPT, task_id=task, **options):
                        has_begun = True
                self.ended.append(("", has_begun))
            except ManyhatsError as error:
                self.ended.append((f"{error.code}: {error}", has_begun))
            except openai.APIError as error:
                self.ended.append((f"HTTP: {error}", False))

    def errors(self) -> list[tuple[str, bool]]:
        return [each for each in self.ended if each[0]]


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_so():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("not within a minute")
