"""Fields of an AdapterHub config, each read with its type; any field that is not read is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, shown
from manyhats.adapters.formats.adapterhub.places import check_encoder
from manyhats.adapters.formats.config_fields import parse_flag, refuse_fields
from manyhats.adapters.sites import BaseDescription

_MAX_LAYERS = 4096
_MAX_NUMBER = 1e6


def refuse_unserved(config: Mapping[str, Any], *, known: Collection[str], refused: Mapping[str, str]) -> None:
    """Refuse fields that are in use and would change the output in ways that are not computed.

    Args:
        config: the method's config.
        known: fields that are read, or that change nothing when the adapter is used.
        refused: fields that must be null, false or empty → what they ask for.

    Raises:
        AdapterUnsupportedError: names the field.
    """
    refusals = {field: f"asks for {what}, which is not served" for field, what in refused.items()}
    refuse_fields(config, known, refusals)


def read_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean; null is false, as in the library.

    Raises:
        AdapterInvalidError: it is another type.
    """
    return parse_flag(key, config.get(key, default))


def check_gating(config: Mapping[str, Any], base: BaseDescription) -> None:
    """Refuse gates where there are only beginnings of texts.

    Raises:
        AdapterInvalidError: ``use_gating`` is not a flag.
        AdapterUnsupportedError: it is set, and the base is no encoder that the library knows.
    """
    if read_flag(config, "use_gating", False):
        check_encoder(base, "use_gating", "a gate, which averages over a whole text")


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number of at most a million in magnitude.

    Raises:
        AdapterInvalidError: it is not one.
    """
    return check_number(key, config.get(key, default))


def check_number(key: str, value: Any) -> float:
    """``value`` as a float, if it is a finite number of at most a million in magnitude.

    Raises:
        AdapterInvalidError: it is not one.
    """
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _MAX_NUMBER:
        raise AdapterInvalidError(
            key, f"must be a number of at most {_MAX_NUMBER:g} in magnitude, not {shown(str(value))}"
        )
    return float(value)


def read_count(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of at least 1.

    Raises:
        AdapterInvalidError: it is not one.
    """
    value = config.get(key, default)
    if type(value) is not int or not 1 <= value <= _MAX_NUMBER:
        raise AdapterInvalidError(key, f"must be a whole number of at least 1, not {shown(str(value))}")
    return value


def read_leave_out(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers, from 0, that the adapter leaves out.

    Raises:
        AdapterInvalidError: it is not a list of layers.
    """
    layers = config.get("leave_out") or []
    if not isinstance(layers, list) or len(layers) > _MAX_LAYERS or not all(type(n) is int for n in layers):
        raise AdapterInvalidError("leave_out", "must be a list of layer numbers")
    return frozenset(layers)
