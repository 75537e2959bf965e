"""How the clients connect."""

from __future__ import annotations

from typing import Final

DEFAULT_TARGET: Final = "127.0.0.1:50051"

_MAX_RESPONSE_BYTES = 256 * 2**20

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # A long prompt's log-probabilities pass gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    # A server that vanished is noticed during a long call. Servers close connections that ping more often
    # than every 5 minutes unless told otherwise, so this is as often as is safe with any of them.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that is starting is found within a second, not after gRPC's growing waits of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
