"""ServerService: describes this server."""

from __future__ import annotations

from importlib.metadata import version

from manyhats.server.grpc import to_proto
from manyhats.server.service.call import Call
from manyhats.server.service.gate import Gate
from manyhats.v1 import server_pb2


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
