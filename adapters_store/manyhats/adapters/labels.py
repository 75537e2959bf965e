"""Labels: what callers attach to a version for their own use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from manyhats.adapters.errors import ArgumentInvalidError

_MAX_LABELS = 64
_MAX_LENGTH = 256


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """A copy that nobody else can change.

    Raises:
        ArgumentInvalidError: too many, too long, or not printable.
    """
    if len(labels) > _MAX_LABELS:
        raise ArgumentInvalidError("labels", f"has {len(labels)} entries; the limit is {_MAX_LABELS}")
    for key, value in labels.items():
        if not key or max(len(key), len(value)) > _MAX_LENGTH or not (key + value).isprintable():
            raise ArgumentInvalidError(
                "labels", f"keys have 1 to {_MAX_LENGTH} printable characters, values at most as many"
            )
    return MappingProxyType(dict(labels))
