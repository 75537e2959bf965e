"""gRPC health: follows the gate, and so the engine's heartbeat."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse

from manyhats.server.service.gate import Gate, ServingState

_log = structlog.get_logger("manyhats.health")


class HealthFollower:
    """Answers ``grpc.health.v1`` for the whole server ("") and for each service by its name, all alike.

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

    async def publish(self) -> ServingState:
        """Set health to what the gate says now, and return it."""
        state = self._gate.state
        is_serving = state is ServingState.READY
        status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.servicer.set(service, status)
        if state is not self._logged:
            self._logged = state
            _log.info("state", state=state.value)
        return state

    async def follow_until_dead(self) -> None:
        """Publish every change for as long as the engine lives; cancel to stop."""
        state = await self.publish()
        while state is not ServingState.DEAD:
            await asyncio.sleep(self._period_s)
            if self._gate.state is not state:
                state = await self.publish()
