"""Fields of a config, whichever library wrote it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError


def refuse_fields(config: Mapping[str, Any], known: Collection[str], refusals: Mapping[str, str]) -> None:
    """Refuse fields that are in use, so not null, false or empty, and that would go unheeded.

    Args:
        config: the parsed config.
        known: fields that are read, or that change nothing when the adapter is used.
        refusals: field → why it cannot be served.

    Raises:
        AdapterUnsupportedError: names the field.
    """
    for field, value in config.items():
        if field in known or value is None or value is False or value in ("", [], {}):
            continue
        raise AdapterUnsupportedError(
            field, refusals.get(field, "is not a field this server knows; it may change the maths")
        )


def parse_flag(field: str, value: Any) -> bool:
    """True or false; null is false, as to the libraries.

    Raises:
        AdapterInvalidError: it is another type.
    """
    if not isinstance(value, bool | None):
        raise AdapterInvalidError(field, "must be true or false")
    return bool(value)
