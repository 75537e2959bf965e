"""Waiting until a server answers: what both clients share."""

from __future__ import annotations

import time
from typing import Final

import grpc
from grpc_health.v1 import health_pb2

from manyhats.client.errors import UnavailableError

HEALTH_CHECK_METHOD: Final = "/grpc.health.v1.Health/Check"
POLL_INTERVAL_S: Final = 0.1

# How a health check fails while a server is starting; any other failure is worth showing at once.
_NOT_YET = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class ReadinessWait:
    """One wait: the time left, and the server's last answer."""

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._state = "does not answer"

    @property
    def remaining_s(self) -> float:
        """Time left, not below zero."""
        return max(0.0, self._deadline_s - time.monotonic())

    def is_ready(self, response: health_pb2.HealthCheckResponse) -> bool:
        """Whether this answer ends the wait; else remembers it."""
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return True
        self._state = "answers, but is not serving yet"
        return False

    def is_temporary(self, code: grpc.StatusCode) -> bool:
        """Whether waiting may cure a failed check."""
        return code in _NOT_YET

    def raise_if_over(self) -> None:
        """Raises UnavailableError once the time is over."""
        if self.remaining_s == 0.0:
            raise UnavailableError(
                f"the server at {self._target} {self._state} (waited {self._timeout_s:g} s)",
                code="UNAVAILABLE",
            )
