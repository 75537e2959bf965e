"""Calls of tasks through a proxy, each in its own way, and what came of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from manyhats.client import AsyncClient, ManyhatsError

PROMPT = "ab"


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        way: how it was made.
        task: that it named.
        begun: whether a part of a stream had come.
        error: why there was no answer, or not all of it; empty if there was.
    """

    way: str
    task: str
    begun: bool = False
    error: str = ""


class Callers:
    """Makes calls through a proxy, none of them twice: what fails there has failed."""

    def __init__(self, client: AsyncClient, http: httpx2.AsyncClient) -> None:
        self.client = client
        self.http = http

    async def grpc(self, task: str, num_tokens: int = 1) -> Outcome:
        """A whole answer by gRPC."""
        try:
            await self.client.generate(PROMPT, task_id=task, max_new_tokens=num_tokens, ignore_eos=True)
        except ManyhatsError as error:
            return Outcome("grpc", task, error=repr(error))
        return Outcome("grpc", task)

    async def grpc_stream(self, task: str, num_tokens: int = 1) -> Outcome:
        """A stream by gRPC."""
        begun = False
        try:
            stream = self.client.generate_stream(
                PROMPT, task_id=task, max_new_tokens=num_tokens, ignore_eos=True
            )
            async for _ in stream:
                begun = True
        except ManyhatsError as error:
            return Outcome("grpc_stream", task, begun, repr(error))
        return Outcome("grpc_stream", task, begun)

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """One request by HTTP."""
        return await self.http.post(path, json=body, headers=headers)

    async def whole(self, task: str, num_tokens: int = 1) -> Outcome:
        """A whole answer by HTTP."""
        try:
            answer = await self.post("/v1/completions", _body(task, num_tokens))
        except httpx2.HTTPError as error:
            return Outcome("http", task, error=repr(error))
        return Outcome("http", task, error="" if answer.status_code == 200 else answer.text)

    async def stream(self, task: str, num_tokens: int = 1) -> Outcome:
        """A stream by HTTP, which has ended well if its last event says so."""
        begun, last = False, ""
        try:
            body = {**_body(task, num_tokens), "stream": True}
            async with self.http.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    begun = begun or line.startswith("data:")
                    last = line or last
        except httpx2.HTTPError as error:
            return Outcome("http_stream", task, begun, repr(error))
        return Outcome("http_stream", task, begun, "" if last == "data: [DONE]" else f"ended with {last!r}")

    def each_way(self) -> Sequence[Callable[..., Any]]:
        """All of the above."""
        return (self.grpc, self.whole, self.grpc_stream, self.stream)

    async def load(
        self, tasks: Iterator[str], num_callers: int, num_tokens: int, is_over: Callable[[int], bool]
    ) -> list[Outcome]:
        """So many callers, each with one call after the other in each way in turn, until it is over.

        ``is_over`` is told the number of calls that have been made.
        """
        outcomes: list[Outcome] = []
        num_made = 0

        async def call(turn: int) -> None:
            nonlocal num_made
            ways = self.each_way()
            while not is_over(num_made):
                num_made, turn = num_made + 1, turn + 1
                outcomes.append(await ways[turn % len(ways)](next(tasks), num_tokens))

        await asyncio.gather(*map(call, range(num_callers)))
        return outcomes


def _body(task: str, num_tokens: int) -> Any:
    return {"model": task, "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True}


@asynccontextmanager
async def callers(target: str) -> AsyncIterator[Callers]:
    """Callers of what listens there for both gRPC and HTTP."""
    async with (
        AsyncClient(target, timeout_s=60, retries=False) as client,
        httpx2.AsyncClient(base_url=f"http://{target}", timeout=60) as http,
    ):
        yield Callers(client, http)


def version_of(answer: httpx2.Response) -> str:
    """Which version of its task gave an answer."""
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-manyhats-version"])
