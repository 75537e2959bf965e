r"""Keys of PEFT's ``rank_pattern`` and ``alpha_pattern``, matched as PEFT does, but in bounded time.

PEFT takes the first key for which ``re.match(rf"(.*\.)?({key})$", module)`` holds. A key may be any regex there. Here
it may hold letters, digits, ``_ - .``, an escaped dot, ``^``, ``$`` and ``|``: no repetition and no groups, so matching
takes time in proportion to key and module. PEFT, its EVA initialisation and hand-written configs use no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError, shown

_ALTERNATIVE = r"\^?(?:[A-Za-z0-9_.-]|\\\.)+\$?"
_PLAIN_KEY = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*")
_MAX_KEYS = 4096
_MAX_KEY_LENGTH = 512

V = TypeVar("V", int, float)


@dataclass(frozen=True, slots=True)
class ModulePatterns(Generic[V]):
    """Values for the modules that a key matches; the first key that matches wins."""

    _patterns: tuple[tuple[re.Pattern[str], V], ...]

    def value_for(self, module: str, default: V) -> V:
        """The value for ``module``, a dotted path such as ``model.layers.0.self_attn.q_proj``."""
        return next((value for pattern, value in self._patterns if pattern.match(module)), default)


def compile_patterns(field: str, values: Mapping[str, V]) -> ModulePatterns[V]:
    """Compile the keys of a pattern field.

    Raises:
        AdapterUnsupportedError: a key uses regex syntax that is not supported here.
        AdapterTooLargeError: over 4096 keys, or a key over 512 characters.
    """
    if len(values) > _MAX_KEYS:
        raise AdapterTooLargeError(field, f"has {len(values)} keys; the limit is {_MAX_KEYS}")
    return ModulePatterns(tuple((_compile(field, key), value) for key, value in values.items()))


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


def _compile(field: str, key: str) -> re.Pattern[str]:
    if len(key) > _MAX_KEY_LENGTH:
        raise AdapterTooLargeError(
            field, f"has a key of {len(key)} characters; the limit is {_MAX_KEY_LENGTH}"
        )
    if _PLAIN_KEY.fullmatch(key) is None:
        raise AdapterUnsupportedError(
            field,
            f"the key '{shown(key)}' uses more regular expression syntax than is supported: names, dots, ^, $ and |",
        )
    return re.compile(rf"(.*\.)?({key})$")
