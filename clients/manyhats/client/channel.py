"""How the clients connect: with or without TLS and a token."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, cast

import grpc
import grpc.aio

from manyhats.client.credentials import Credentials

DEFAULT_TARGET: Final = "127.0.0.1:50051"

_MAX_RESPONSE_BYTES = 256 * 2**20

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # A long prompt's log-probabilities exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    # A server that vanished is noticed during a long call. Servers close connections that ping more often than every 5
    # minutes unless told otherwise, so this is the most frequent interval that is safe with any of them.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that is starting is found within a second, not after gRPC's backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_NO_CREDENTIALS: Final = Credentials()
_Metadata = tuple[tuple[str, str], ...]


def open_channel(target: str, credentials: Credentials | None) -> grpc.Channel:
    """A channel of the blocking client.

    Raises:
        CredentialsError: the credentials cannot be used, or would leave this machine unencrypted.
    """
    given = credentials or _NO_CREDENTIALS
    secure = given.channel_credentials()
    if secure is not None:
        return grpc.secure_channel(target, secure, options=CHANNEL_OPTIONS)
    metadata = given.clear_metadata(target)
    channel = grpc.insecure_channel(target, options=_clear_options(metadata))
    return cast(grpc.Channel, _MetadataChannel(channel, metadata)) if metadata else channel


def open_aio_channel(target: str, credentials: Credentials | None) -> grpc.aio.Channel:
    """A channel of the asyncio client.

    Raises:
        CredentialsError: as ``open_channel``.
    """
    given = credentials or _NO_CREDENTIALS
    secure = given.channel_credentials()
    if secure is not None:
        return grpc.aio.secure_channel(target, secure, options=CHANNEL_OPTIONS)
    metadata = given.clear_metadata(target)
    channel = grpc.aio.insecure_channel(target, options=_clear_options(metadata))
    return cast(grpc.aio.Channel, _MetadataChannel(channel, metadata)) if metadata else channel


def _clear_options(metadata: _Metadata) -> tuple[tuple[str, int], ...]:
    # A proxy from the environment would read the token, even on the way to this machine.
    return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if metadata else CHANNEL_OPTIONS


class _MetadataChannel:
    """A channel, of either client, whose every call carries metadata.

    gRPC sends call credentials only over secure channels; interceptors would replace gRPC's calls with their own.
    """

    def __init__(self, channel: Any, metadata: _Metadata) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return partial(self._channel.unary_unary(*args, **options), metadata=self._metadata)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return partial(self._channel.unary_stream(*args, **options), metadata=self._metadata)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return partial(self._channel.stream_unary(*args, **options), metadata=self._metadata)

    def close(self) -> Any:
        return self._channel.close()
