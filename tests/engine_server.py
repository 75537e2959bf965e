"""A real engine behind a real gRPC port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import grpc

from engine_harness import running_engine
from manyhats.engine.async_engine import AsyncEngine
from manyhats.engine.model.loader import LoadedModel
from manyhats.server.gate import Gate
from manyhats.server.grpc_port import GrpcPort
from manyhats.server.metrics import Metrics
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from server_fakes import INFO, MemoryStore, make_backend

if TYPE_CHECKING:
    from manyhats.v1.generation_pb2_grpc import GenerationServiceAsyncStub

# Otherwise gRPC takes megabytes for a client that reads nothing.
_SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))


@dataclass(frozen=True)
class Served:
    """An engine, and a client of its own port that takes little ahead of its reader."""

    engine: AsyncEngine
    generation: GenerationServiceAsyncStub
    address: str


@asynccontextmanager
async def served_engine(model: LoadedModel, **config: Any) -> AsyncIterator[Served]:
    """Serves a tiny model; ``config`` is the engine's."""
    async with running_engine(model, **config) as engine:
        metrics, gate = Metrics(max_task_labels=4), Gate(heartbeat_limit_s=60.0)
        backend = replace(
            make_backend(cast(Any, engine), MemoryStore()),
            tokenizer=model.tokenizer,
            info=replace(INFO, vocab_size=model.config.vocab_size),
        )
        metrics.attach(backend)
        gate.open(backend)
        port = GrpcPort(gate, metrics, host="127.0.0.1", port=0, unread_limit_s=engine.config.unread_limit_s)
        await port.start()
        try:
            async with grpc.aio.insecure_channel(port.address, options=_SMALL_WINDOW) as channel:
                yield Served(engine, GenerationServiceStub(channel), port.address)
        finally:
            await port.stop(0.0)
