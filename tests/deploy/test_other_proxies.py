"""nginx and HAProxy, with what docs/replicas.md has for them, in front of two servers: they go by the header."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from support.fakes.server import Running, make_record, running_server
from support.harnesses.replica_calls import PROMPT, Callers, callers
from support.servers.replicas import DOCUMENT, free_port

pytestmark = pytest.mark.deploy

TASKS = [f"task{index:02}" for index in range(24)]
NGINX = """daemon off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
access_log off;
client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
{0}
}}
"""


def documented(language: str, ports: dict[str, int]) -> str:
    """The configuration that the documentation has, with other ports."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return re.sub(r"\b(?:50051|50052|800[12]|808[01])\b", lambda found: str(ports[found[0]]), text)


@contextmanager
def running(directory: Path, program: str, *arguments: str) -> Iterator[None]:
    """Within the block a proxy runs."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    assert path is not None, f"{program} is not installed (scripts/need_proxies.sh)"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([path, *arguments], cwd=directory, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[list[Running], dict[str, int]]]:
    """Servers of fakes that have all tasks, and which port is to be what in the documentation."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running_server()) for _ in range(2)]
        for server in servers:
            for task in TASKS:
                server.store.tasks[task] = [make_record(task, 1), make_record(task, 2)]
        ports = {"8080": free_port(), "8081": free_port()}
        for number, server in enumerate(servers, 1):
            ports[f"5005{number}"] = int(server.port.address.rpartition(":")[2])
            ports[f"800{number}"] = int(server.http.rpartition(":")[2])
        yield servers, ports


async def until_ready(made: Callers) -> None:
    """Return once the proxy knows both servers, for either protocol."""
    for _ in range(200):
        outcomes = [await call("") for call in made.each_way() for _ in range(4)]
        if not any(each.error for each in outcomes):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(outcomes)


async def check(made: Callers, servers: list[Running], *, meet: bool) -> None:
    """Each task's calls go to one server, of either protocol; to the same, where they are to meet."""
    homes: dict[str, list[int]] = {"grpc": [], "http": []}
    for task in TASKS:
        for protocol, found in homes.items():
            before = num_calls(servers)
            for name in (task, f"{task}@2", task):
                assert (await call(made, protocol, name)) == ""
            answered = [after - was for after, was in zip(num_calls(servers), before, strict=True)]
            assert sorted(answered) == [0, 3], (protocol, task)
            found.append(answered.index(3))
    for found in homes.values():
        assert 4 <= sum(found) <= len(TASKS) - 4
    assert not meet or homes["grpc"] == homes["http"]
    before = num_calls(servers)
    for _ in range(30):
        assert (await made.grpc("")).error == ""
    assert all(after > was for after, was in zip(num_calls(servers), before, strict=True))


async def call(made: Callers, protocol: str, name: str) -> str:
    """Why there is no answer; empty if there is."""
    if protocol == "grpc":
        return (await made.grpc_stream(name)).error
    headers = {"x-manyhats-task": name}
    answer = await made.post("/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 1}, **headers)
    return "" if answer.status_code == 200 else answer.text


def num_calls(servers: list[Running]) -> list[int]:
    return [len(server.engine.requests) for server in servers]


async def test_haproxy(tmp_path: Path) -> None:
    async with two_servers() as (servers, ports):
        (tmp_path / "haproxy.cfg").write_text(documented("text", ports))
        with running(tmp_path, "haproxy", "-f", "haproxy.cfg"):
            async with callers(f"127.0.0.1:{ports['8080']}") as made:
                await until_ready(made)
                await check(made, servers, meet=True)


async def test_nginx(tmp_path: Path) -> None:
    async with two_servers() as (servers, ports):
        (tmp_path / "nginx.conf").write_text(NGINX.format(documented("nginx", ports)))
        with running(tmp_path, "nginx", "-p", str(tmp_path), "-c", "nginx.conf"):
            async with (
                callers(f"127.0.0.1:{ports['8080']}") as http,
                callers(f"127.0.0.1:{ports['8081']}") as grpc,
            ):
                made = Callers(grpc.client, http.http)
                await until_ready(made)
                await check(made, servers, meet=False)
