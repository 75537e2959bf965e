"""OpenAI's own client of a server's HTTP port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai

from support.fakes.server import Running
from support.harnesses.engine_server import Ports, Served


@asynccontextmanager
async def client_of(
    server: Running | Served | Ports, *, is_strict: bool = True, max_retries: int = 0, **options: Any
) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client; if it is strict, it takes nothing but what the API's description allows."""
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.http}/v1",
        max_retries=max_retries,
        _strict_response_validation=is_strict,
        **{"api_key": "none", **options},
    ) as client:
        yield client
