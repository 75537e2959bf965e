"""File system errors as the store's own; their text names no path."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from manyhats.adapters.errors import StoreError, StoreFullError, StoreUnavailableError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn an OSError raised inside into a StoreError."""
    try:
        yield
    except OSError as error:
        raise store_error(error) from error


def store_error(error: OSError) -> StoreError:
    """What an OSError means to a caller of the store."""
    if error.errno in _FULL:
        return StoreFullError("store", "no space is left for the artifact")
    return StoreUnavailableError("store", f"cannot be read or written: {error.strerror}")
