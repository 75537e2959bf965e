"""What PEFT's configs of virtual tokens share: ``PromptLearningConfig``, the tensor it describes, and their checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    ArtifactError,
    BaseMismatchError,
    shown,
)
from manyhats.adapters.formats.base_name import is_known_name
from manyhats.adapters.formats.peft.fields import check_fields
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sites import BaseDescription

PROMPT_EMBEDDINGS = "prompt_embeddings"
"""The tensor that every method of virtual tokens saves."""

_COMMON = frozenset(
    ("num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim")
)
_REFUSED = {"modules_to_save": "modules trained as a whole, which are not served with virtual tokens"}


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """The fields that every config of virtual tokens has; PEFT takes those that are None from the base model.

    Attributes:
        num_virtual_tokens: P.
        token_dim: features of one virtual token: D, or Hkv · K for a KV prefix.
        num_attention_heads: H, or Hkv for a KV prefix.
        num_layers: L.
    """

    num_virtual_tokens: int
    token_dim: int | None
    num_attention_heads: int | None
    num_layers: int | None


def parse_prompt_config(config: Mapping[str, Any], own_fields: Collection[str]) -> PromptConfig:
    """Read the shared fields; ``own_fields`` are those that the method itself knows.

    Raises:
        AdapterUnsupportedError: a field needs something that is not computed here, or is unknown.
        AdapterInvalidError: a field has the wrong type or is out of range.
    """
    check_fields(config, _COMMON.union(own_fields), _REFUSED)
    if _parse_optional_count(config, "num_transformer_submodules") not in (None, 1):
        raise AdapterUnsupportedError(
            "num_transformer_submodules", "must be 1: only decoders are served, not encoder-decoders"
        )
    if config.get("num_virtual_tokens") is None:
        raise AdapterInvalidError("num_virtual_tokens", "is missing")
    return PromptConfig(
        num_virtual_tokens=parse_count("num_virtual_tokens", config["num_virtual_tokens"]),
        token_dim=_parse_optional_count(config, "token_dim"),
        num_attention_heads=_parse_optional_count(config, "num_attention_heads"),
        num_layers=_parse_optional_count(config, "num_layers"),
    )


def parse_count(field: str, value: Any) -> int:
    """A whole number of at least 1.

    Raises:
        AdapterInvalidError: it is something else.
    """
    if type(value) is not int or value < 1:
        raise AdapterInvalidError(field, f"must be a whole number of at least 1, not {shown(str(value))}")
    return value


def _parse_optional_count(config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    return None if value is None else parse_count(field, value)


def check_num_virtual_tokens(config: PromptConfig, limits: AdapterLimits) -> None:
    """Check P against its limit.

    Raises:
        AdapterTooLargeError: it is over.
    """
    if config.num_virtual_tokens > limits.max_virtual_tokens:
        raise AdapterTooLargeError(
            "num_virtual_tokens",
            f"is {config.num_virtual_tokens}; the limit is {limits.max_virtual_tokens}",
        )


def check_tensor_names(shapes: Mapping[str, tuple[int, ...]], expected: Collection[str]) -> None:
    """Check that every expected tensor is there, and no other.

    Raises:
        AdapterInvalidError: names the first that is missing, or not of this method.
    """
    for name in expected:
        if name not in shapes:
            raise AdapterInvalidError(name, "is missing")
    for name in sorted(shapes):
        if name not in expected:
            raise AdapterInvalidError(name, "is not a tensor of this method; every tensor must be used")


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check that a tensor has the shape that its own config requires.

    Raises:
        AdapterInvalidError: it has another.
    """
    if shape != expected:
        raise AdapterInvalidError(name, f"has shape {list(shape)}; its config requires {list(expected)}")


def check_fits(
    subject: str, actual: int | None, expected: int, base: BaseDescription, base_model: str
) -> None:
    """Check that a number of the artifact equals the base's; None always does.

    Raises:
        BaseMismatchError: it is not, and the artifact does not name this base.
        AdapterInvalidError: it is not, though the artifact names this base.
    """
    if actual is None or actual == expected:
        return
    description = f"is {actual}; the base has {expected}"
    error: type[ArtifactError | BaseMismatchError] = (
        AdapterInvalidError if is_known_name(base_model, base) else BaseMismatchError
    )
    raise error(subject, description)
