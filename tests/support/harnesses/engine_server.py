"""A real engine behind real ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import grpc

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.progress import no_progress
from manyhats.server.grpc.port import GrpcLimits, GrpcPort
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.http.port import HttpPort
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.wiring import open_backend
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.backend import Backend
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate
from manyhats.v1.encoding_pb2_grpc import EncodingServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.fakes.server import INFO, SMALL_WINDOW, MemoryStore, make_backend
from support.harnesses.engine import running_engine

if TYPE_CHECKING:
    from manyhats.v1.encoding_pb2_grpc import EncodingServiceAsyncStub
    from manyhats.v1.generation_pb2_grpc import GenerationServiceAsyncStub


@dataclass(frozen=True)
class Served:
    """An engine, and a client of its own gRPC port that takes little ahead of its reader."""

    engine: Engine
    generation: GenerationServiceAsyncStub
    encoding: EncodingServiceAsyncStub
    address: str
    http: str
    metrics: Metrics


@asynccontextmanager
async def served_engine(model: LoadedModel, store: Any = None, **config: Any) -> AsyncIterator[Served]:
    """Serves a tiny model; ``config`` is the engine's, ``store`` an open one, instead of one without tasks."""
    async with running_engine(model, None if store is None else store.lower, **config) as engine:
        backend = replace(
            make_backend(cast(Any, engine), store or MemoryStore(), model.tokenizer),
            info=replace(
                INFO,
                digest=model.description.digest,
                vocab_size=model.architecture.vocab_size,
                embedding_size=model.description.read_size,
                kind=model.description.kind,
            ),
        )
        metrics = Metrics(max_task_labels=4)
        async with (
            _ports(backend, metrics, unread_limit_s=engine.config.unread_limit_s) as (address, http),
            grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as channel,
        ):
            generation, encoding = GenerationServiceStub(channel), EncodingServiceStub(channel)
            yield Served(engine, generation, encoding, address, http, metrics)


@asynccontextmanager
async def served_config(config: ServeConfig) -> AsyncIterator[tuple[str, Backend]]:
    """Serves what a server's process would by these settings: the port's address, and what answers there."""
    metrics = Metrics(max_task_labels=10)
    backend = await asyncio.to_thread(open_backend, config, metrics, no_progress)
    try:
        await backend.engine.start()
        async with _ports(backend, metrics) as (address, _):
            yield address, backend
    finally:
        await backend.engine.stop(0.0)
        backend.store.close()


@dataclass(frozen=True)
class Ports:
    """Addresses of one server's ports."""

    grpc: str
    http: str


@asynccontextmanager
async def served_ports(config: ServeConfig) -> AsyncIterator[Ports]:
    """Serves what a server's process would by these settings, on both ports."""
    metrics = Metrics(max_task_labels=10)
    async with served_config(config) as (address, backend):
        gate = Gate(heartbeat_limit_s=60.0)
        gate.open(backend)
        around = Surroundings(calls=Calls(gate, metrics), answers=Answers(unread_limit_s=60.0))
        http = HttpPort(make_app(around, is_local=True), host="127.0.0.1", port=0)
        await http.start()
        try:
            yield Ports(address, http.address)
        finally:
            await http.stop(0.0)


@asynccontextmanager
async def _ports(backend: Backend, metrics: Metrics, **limits: Any) -> AsyncIterator[tuple[str, str]]:
    """Ports of its own, gRPC and HTTP, by their addresses."""
    gate = Gate(heartbeat_limit_s=60.0)
    metrics.attach(backend)
    gate.open(backend)
    calls, limits_of_grpc = Calls(gate, metrics), GrpcLimits(**limits)
    port = GrpcPort(calls, host="127.0.0.1", port=0, limits=limits_of_grpc)
    answers = Answers(unread_limit_s=limits_of_grpc.unread_limit_s)
    http = HttpPort(make_app(Surroundings(calls=calls, answers=answers)), host="127.0.0.1", port=0)
    await port.start()
    await http.start()
    try:
        yield port.address, http.address
    finally:
        await port.stop(0.0)
        await http.stop(0.0)
