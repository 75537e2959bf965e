"""Reading PEFT's config fields: what all methods share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, shown
from manyhats.adapters.formats.config_fields import refuse_fields

_MAX_ALPHA = 1e6

# Fields about training, fields that the tensors answer better, and fields of any PEFT method.
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        # PEFT sets it by the module itself; what it saves has one orientation.
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    )
)


def check_fields(
    config: Mapping[str, Any],
    own_fields: Collection[str],
    refused: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse fields that are set and that neither the method nor this server knows.

    Args:
        config: the parsed ``adapter_config.json``.
        own_fields: those that the method reads, or knows to change nothing.
        refused: field → what it asks for, if that can't be served.

    Raises:
        AdapterUnsupportedError: names the field.
    """
    refusals = {field: f"asks for {what}" for field, what in refused.items()}
    refuse_fields(config, _HARMLESS.union(own_fields), refusals)


def check_bias_field(config: Mapping[str, Any], own_value: str) -> None:
    """Check ``bias``, which allows for trained biases; those are refused if the tensors hold any.

    Raises:
        AdapterInvalidError: it is not one of PEFT's values.
    """
    if config.get("bias", "none") not in ("none", "all", own_value, None):
        raise AdapterInvalidError("bias", f"must be none, all or {own_value}")


def parse_rank(field: str, value: Any) -> int:
    """A rank: a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise AdapterInvalidError(field, f"a rank is a whole number of at least 1, not {shown(str(value))}")
    return value


def parse_alpha(field: str, value: Any) -> float:
    """LoRA's alpha: a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _MAX_ALPHA:
        raise AdapterInvalidError(field, f"alpha is a number up to {_MAX_ALPHA:g}, not {shown(str(value))}")
    return float(value)
