"""How many files, and so connections, the process may have open."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import structlog

_log = structlog.get_logger("manyhats.files")

# Enough for any number of callers; some systems allow a billion, or report no limit.
_ENOUGH = 65_536


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Connections that each port may have open; the other files are for adapters, logs and libraries."""

    grpc: int
    http: int


def raise_file_limit() -> int:
    """Raise the limit on open files as far as allowed, or as needed, and return it.

    Systems default to 1,024 for the sake of old programs, and leave it to others to ask for more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _log.debug("limit on open files raised", before=soft, now=wanted)
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def connection_limits(file_limit: int) -> ConnectionLimits:
    """How many connections leave enough files of ``file_limit`` for everything else."""
    return ConnectionLimits(grpc=min(file_limit // 2, 8192), http=min(file_limit // 8, 256))
