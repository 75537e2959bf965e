"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([a-z]*)", re.IGNORECASE | re.ASCII)
_UNITS: Mapping[str, int] = MappingProxyType(
    {"": 1, "b": 1}
    | {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
    | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
)


def parse_size(text: str) -> int:
    """The bytes of a string such as ``1GiB``, ``1.5 GiB``, ``500MB`` or ``1073741824``.

    KiB, MiB, GiB and TiB are powers of 1024; kB, MB, GB and TB powers of 1000; case does not matter.

    Raises:
        ValueError: it is not a size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match is not None else None
    size = Fraction(match[1]) * unit if match is not None and unit is not None else None
    if size is None or size.denominator != 1:
        raise ValueError(f"must be a size such as 1GiB, 512MiB, 2GB or a number of bytes, not {text!r}")
    return int(size)


def size_text(size: int) -> str:
    """The shortest string of whole units that ``parse_size`` reads as ``size`` bytes, such as ``8GiB``."""
    for power, letter in reversed(list(enumerate("KMGT", start=1))):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{letter}iB"
    return str(size)
