"""Which calls are tried again by themselves, and when: a service config, which gRPC carries out."""

from __future__ import annotations

import json
from typing import Any, Final

# A refusal, too busy or full, did nothing: what was asked may be asked again. A server that cannot be reached, or went
# away, may have done it.
_REFUSED: Final = ("RESOURCE_EXHAUSTED",)
_REFUSED_OR_GONE: Final = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")

_ADAPTERS: Final = "manyhats.v1.AdapterService"

# Doing these twice is as good as once; registrations have a request id.
_REPEATABLE: Final[tuple[dict[str, str], ...]] = (
    {"service": "manyhats.v1.GenerationService"},
    {"service": "manyhats.v1.EncodingService"},
    {"service": "manyhats.v1.ServerService"},
    *(
        {"service": _ADAPTERS, "method": method}
        for method in ("GetAdapter", "ListAdapters", "RegisterAdapter")
    ),
)
# Done twice, these may undo what another caller did between. UploadAdapter is in neither list: where the first attempt
# ends while messages are still being sent, gRPC's next attempt may lack some of them (grpcio 1.85.3).
_CHANGES: Final[tuple[dict[str, str], ...]] = tuple(
    {"service": _ADAPTERS, "method": method}
    for method in ("ActivateAdapter", "PinAdapter", "UnpinAdapter", "DeleteAdapter")
)


def _policy(*codes: str) -> dict[str, Any]:
    # The times are for servers that name none: ours says when in ``grpc-retry-pushback-ms``, or not to come back.
    return {
        "maxAttempts": 4,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": codes,
    }


SERVICE_CONFIG: Final = json.dumps(
    {
        "methodConfig": [
            {"name": _REPEATABLE, "retryPolicy": _policy(*_REFUSED_OR_GONE)},
            {"name": _CHANGES, "retryPolicy": _policy(*_REFUSED)},
        ],
        # No more is tried again once 500 more attempts to this server failed than succeeded, by all clients here.
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1},
    }
)
"""Streams are tried again until their first message comes."""

RETRY_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.service_config", SERVICE_CONFIG),
    # Twice the largest request that servers take: gRPC forgets one that is larger, by default than 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", 16 * 2**20),
)
"""Of a channel whose calls are tried again."""
