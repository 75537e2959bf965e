"""How the clients connect: with or without TLS and a token, trying again or not; what every call carries."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import grpc
import grpc.aio

from manyhats.client.credentials import Credentials
from manyhats.client.retries import RETRY_OPTIONS

DEFAULT_TARGET: Final = "127.0.0.1:50051"

TASK_KEY: Final = "x-manyhats-task"

# What a header can have, and a task's name may.
_TASK: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(?:@[0-9]{1,10})?")

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
AnyChannel = TypeVar("AnyChannel", grpc.Channel, grpc.aio.Channel)


def open_channel(target: str, credentials: Credentials | None, *, retries: bool) -> grpc.Channel:
    """A channel of the blocking client, with ``carrying`` around it.

    Raises:
        CredentialsError: the credentials cannot be used, or would leave this machine unencrypted.
    """
    given = credentials or _NO_CREDENTIALS
    secure = given.channel_credentials()
    if secure is not None:
        return carrying(grpc.secure_channel(target, secure, options=_options(retries)))
    metadata = given.clear_metadata(target)
    return carrying(grpc.insecure_channel(target, options=_options(retries, metadata)), metadata)


def open_aio_channel(target: str, credentials: Credentials | None, *, retries: bool) -> grpc.aio.Channel:
    """A channel of the asyncio client, with ``carrying`` around it.

    Raises:
        CredentialsError: as ``open_channel``.
    """
    given = credentials or _NO_CREDENTIALS
    secure = given.channel_credentials()
    if secure is not None:
        return carrying(grpc.aio.secure_channel(target, secure, options=_options(retries)))
    metadata = given.clear_metadata(target)
    return carrying(grpc.aio.insecure_channel(target, options=_options(retries, metadata)), metadata)


def carrying(channel: AnyChannel, metadata: _Metadata = ()) -> AnyChannel:
    """A channel whose every call carries ``metadata``, and the task that its message names."""
    return cast(AnyChannel, _CarryingChannel(channel, metadata))


def task_metadata(message: object) -> _Metadata:
    """``x-manyhats-task``, for proxies that send all calls of a task to one replica.

    The task, with its version if it has one, is what the message names; of several the first. Nothing if it names
    none, or what cannot be a task: the server will say so.
    """
    named: str = next(iter(getattr(message, "task_ids", ())), "") or getattr(message, "task_id", "")
    return ((TASK_KEY, named),) if _TASK.fullmatch(named) else ()


def _options(retries: bool, metadata: _Metadata = ()) -> tuple[tuple[str, int | str], ...]:
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS]
    if retries:
        options += RETRY_OPTIONS
    if metadata:
        # A proxy from the environment would read the token, even on the way to this machine.
        options.append(("grpc.enable_http_proxy", 0))
    return tuple(options)


class _CarryingChannel:
    """A channel, of either client, whose every call carries metadata.

    gRPC sends call credentials only over secure channels; interceptors would replace gRPC's calls with their own.
    """

    def __init__(self, channel: Any, metadata: _Metadata) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._carrying(self._channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._carrying(self._channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._carrying(self._channel.stream_unary(*args, **options))

    def close(self) -> Any:
        return self._channel.close()

    def _carrying(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*request: Any, metadata: _Metadata = (), **options: Any) -> Any:
            named = task_metadata(request[0]) if request else ()
            return method(*request, metadata=(*self._metadata, *named, *metadata), **options)

        return call
