"""Options that are given several times, each ``KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Iterable

from manyhats.cli.failures import UsageError


def as_mapping(flag: str, form: str, parts: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """The texts of an option as a mapping.

    Args:
        flag: named in errors.
        form: of one text, such as ``TASK=PATH``.
        parts: each text cut at its ``=``, the first or the last one.

    Raises:
        UsageError: one is not of that form, or a key comes twice.
    """
    parsed: dict[str, str] = {}
    for key, equals, value in parts:
        if not (key and value):
            raise UsageError(f"{flag} must be {form}, not {key + equals + value!r}")
        if key in parsed:
            raise UsageError(f"{flag} names {key} twice")
        parsed[key] = value
    return parsed
