"""Many prompts on a real server that is killed, or told to end, half-way: the answers are those of a calm run."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from manyhats.client import AsyncClient, Client
from restart_under_load import serve_command, serving

pytestmark = [pytest.mark.deploy, pytest.mark.real_model]

PROMPTS = [f"{number} is a number that" for number in range(64)]
NUM_TOKENS = 24
# Shorter than an answer takes, so that a server that ends cuts some off.
DRAIN_S = 0.2


@pytest.fixture
def command(tmp_path: Path) -> Sequence[str]:
    """The same server each time: on one port, with one store."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return serve_command(
        tmp_path / "server.yaml",
        model="smollm2-135m-instruct",
        store=str(tmp_path / "store"),
        grpc_port=port,
        drain_limit_s=DRAIN_S,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_server_that_ends_and_comes_back_changes_no_answer(
    command: Sequence[str], how: signal.Signals
) -> None:
    half_done = asyncio.Event()

    def note(done: int, total: int) -> None:
        if 2 * done >= total:
            half_done.set()

    with serving(command) as (process, ready):
        with Client(ready["grpc"]) as calm:
            expected = await asyncio.to_thread(
                calm.generate_many, PROMPTS, max_new_tokens=NUM_TOKENS, progress=False
            )
        async with AsyncClient(ready["grpc"]) as client:
            asking = asyncio.create_task(
                client.generate_many(PROMPTS, max_new_tokens=NUM_TOKENS, concurrency=8, progress=note)
            )
            await half_done.wait()
            process.send_signal(how)
            await asyncio.to_thread(process.wait)
            assert not asking.done()
            with serving(command):
                answers = await asking
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
