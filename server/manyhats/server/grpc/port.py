"""The gRPC server: services, health, reflection and limits on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from manyhats.engine.config import EngineConfig
from manyhats.server.access.addresses import join_host_port
from manyhats.server.access.tls import ServerTls
from manyhats.server.access.tokens import TokenFile
from manyhats.server.grpc import to_proto
from manyhats.server.grpc.adapters import AdapterService
from manyhats.server.grpc.encoding import EncodingService
from manyhats.server.grpc.generation import GenerationService
from manyhats.server.grpc.interceptor import CallInterceptor
from manyhats.server.service.answers import MAX_ANSWER_BYTES, Answers
from manyhats.server.service.call import Call, Calls
from manyhats.server.service.errors import AddressError
from manyhats.server.service.gate import Gate, ServingState
from manyhats.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    encoding_pb2,
    encoding_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

SERVICES = tuple(
    service.full_name
    for file in (generation_pb2, encoding_pb2, adapter_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
STORE = "manyhats.store"
"""The health service that says whether the store can be used for everything."""
MAX_REQUEST_BYTES = 8 * 1024 * 1024
# The gate counts calls whose message has arrived, and refuses more with details; this also bounds those that send none.
_MAX_OPEN_CALLS = 16_384

_log = structlog.get_logger("manyhats.health")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcLimits:
    """What one port handles at once.

    Attributes:
        max_connections: further ones are closed as they arrive.
        unread_limit_s: an answer of which nothing is read for this long is abandoned.
        max_answer_bytes: of one answer, and of all large ones together that wait to be read.
    """

    max_connections: int = 4096
    unread_limit_s: float = EngineConfig().unread_limit_s
    max_answer_bytes: int = MAX_ANSWER_BYTES


class GrpcPort:
    """A gRPC server on one address; requests are admitted by the gate.

    Args:
        calls: admits and accounts for them, and knows the backend.
        host, port: where to listen; port 0 for any free one.
        tls: encrypts; None for no TLS.
        tokens: knows callers; None lets everyone do everything.
        limits: of connections and answers.

    Raises:
        AddressError: the address cannot be bound.
    """

    def __init__(
        self,
        calls: Calls,
        *,
        host: str,
        port: int,
        tls: ServerTls | None = None,
        tokens: TokenFile | None = None,
        limits: GrpcLimits = GrpcLimits(),
    ) -> None:
        self.health = HealthFollower(calls.gate, SERVICES)
        answers = Answers(unread_limit_s=limits.unread_limit_s, max_bytes=limits.max_answer_bytes)
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(calls, answers, tokens)],
            options=(
                *_OPTIONS,
                ("grpc.max_send_message_length", limits.max_answer_bytes),
                ("grpc.max_allowed_incoming_connections", limits.max_connections),
            ),
            maximum_concurrent_rpcs=_MAX_OPEN_CALLS,
        )
        add_services(self._server, calls, self.health)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health_name, reflection.SERVICE_NAME), self._server)
        self.address = self._bind(host, port, tls)

    def _bind(self, host: str, port: int, tls: ServerTls | None) -> str:
        address = join_host_port(host, port)
        try:
            if tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            raise AddressError("gRPC", address) from error
        return join_host_port(host, bound)

    async def start(self) -> None:
        """Answer calls; before the gate opens, with UNAVAILABLE."""
        await self.health.publish()
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls, and cancel those still running after ``grace_s``."""
        await self._server.stop(grace_s)


def add_services(server: grpc.aio.Server, calls: Calls, health: HealthFollower) -> None:
    """Register all services on a server, whose interceptor passes them a call instead of gRPC's context."""
    gate, metrics = calls.gate, calls.metrics
    generation: Any = GenerationService(gate, metrics)
    encoding: Any = EncodingService(gate, metrics)
    adapters: Any = AdapterService(gate, metrics)
    info: Any = ServerService(gate, MAX_REQUEST_BYTES)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
    encoding_pb2_grpc.add_EncodingServiceServicer_to_server(encoding, server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(info, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """The port's credentials; connections that start after the files changed use the new content."""
    given = tls.current

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(given.key, given.certificate)], given.client_ca)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before every handshake, in its own thread; None means no change."""
        nonlocal given
        now = tls.current
        if now is given:
            return None
        given = now
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        changed,  # type: ignore[arg-type]  # None is allowed: no change
        require_client_authentication=given.client_ca is not None,
    )


_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # A second server on the same port must fail, not share its calls.
    ("grpc.so_reuseport", 0),
    # With more calls than this at once, gRPC would cancel some silently; the gate should refuse them.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
    # A connecting caller must complete TLS and HTTP/2 handshakes, and is dropped if it makes no calls; clients
    # reconnect on their own.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # Detects a client that vanished without closing its connection, so that its requests end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class ServerService:
    """Describes the backend behind the gate; ``max_request_bytes`` is the port's limit for one message."""

    def __init__(self, gate: Gate, max_request_bytes: int) -> None:
        self._gate = gate
        self._max_request_bytes = max_request_bytes

    async def GetServerInfo(  # noqa: N802
        self, request: server_pb2.GetServerInfoRequest, call: Call
    ) -> server_pb2.GetServerInfoResponse:
        """Describe the server and the base model."""
        return to_proto.server_info(self._gate.backend, version("manyhats"), self._max_request_bytes)


class HealthFollower:
    """Answers ``grpc.health.v1`` for the whole server ("") and each service by its name, all alike, and for the store.

    Args:
        gate: knows the state.
        services: full names of the services.
        period_s: how often the state is looked at.
    """

    def __init__(self, gate: Gate, services: Sequence[str], *, period_s: float = 0.2) -> None:
        self.servicer = health.aio.HealthServicer()
        self._gate = gate
        self._services = ("", *services)
        self._period_s = period_s
        self._logged: ServingState | None = None
        self._is_store_whole = False

    async def publish(self) -> ServingState:
        """Set health to what the gate says now, and return it."""
        state, self._is_store_whole = self._gate.state, self._gate.is_store_whole
        for service in self._services:
            await self.servicer.set(service, _status(state is ServingState.READY))
        await self.servicer.set(STORE, _status(self._is_store_whole))
        if state is not self._logged:
            self._logged = state
            _log.info("state", state=state.value)
        return state

    async def follow_until_dead(self) -> None:
        """Publish every change for as long as the engine lives; cancel to stop."""
        state = await self.publish()
        while state is not ServingState.DEAD:
            await asyncio.sleep(self._period_s)
            if self._gate.state is not state or self._gate.is_store_whole is not self._is_store_whole:
                state = await self.publish()


def _status(is_serving: bool) -> Any:
    return HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
