r"""Keys of PEFT's ``rank_pattern`` and ``alpha_pattern``, matched as PEFT does, but in bounded time and memory.

PEFT takes the first key for which ``re.match(rf"(.*\.)?({key})$", module)`` holds; ``regex`` says what a key may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from manyhats.adapters.formats.peft.regex import Regex, RegexSet, translate_ending

_MAX_KEYS = 4096
_MAX_KEY_LENGTH = 512

V = TypeVar("V", int, float)


@dataclass(frozen=True, slots=True)
class ModulePatterns(Generic[V]):
    """Values for the modules that a key matches; the first key that matches wins."""

    _keys: RegexSet
    _values: tuple[V, ...]

    def value_for(self, module: str, default: V) -> V:
        """The value for ``module``, a dotted path such as ``model.layers.0.self_attn.q_proj``."""
        if not self._values:
            return default
        first = self._keys.first_match(module)
        return default if first is None else self._values[first]


def compile_patterns(field: str, values: Mapping[str, V]) -> ModulePatterns[V]:
    """Compile the keys of a pattern field.

    Raises:
        AdapterInvalidError: a key is not a regular expression.
        AdapterUnsupportedError: a key uses regex syntax that is not supported here.
        AdapterTooLargeError: over 4096 keys, a key over 512 characters, or what takes too much memory to match.
    """
    if len(values) > _MAX_KEYS:
        raise AdapterTooLargeError(field, f"has {len(values)} keys; the limit is {_MAX_KEYS}")
    keys = RegexSet(field, (_translate(field, key) for key in values))
    return ModulePatterns(keys, tuple(values.values()))


def check_pattern_field(field: str, value: Any) -> Mapping[str, Any]:
    """A pattern field as a map; None is an empty one.

    Raises:
        AdapterInvalidError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterInvalidError(field, "must be a map of module names to numbers")
    return value


def _translate(field: str, key: str) -> Regex:
    if len(key) > _MAX_KEY_LENGTH:
        raise AdapterTooLargeError(
            field, f"has a key of {len(key)} characters; the limit is {_MAX_KEY_LENGTH}"
        )
    return translate_ending(key, field, "the key")
