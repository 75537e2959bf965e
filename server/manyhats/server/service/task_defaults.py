"""What a task's version decides for fields that callers leave out: its labels ``default.temperature`` and so on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from manyhats.adapters.reserved_labels import DEFAULT, STOP, label_error, listed
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.request import SamplingParams, SpeculationParams, StoppingParams

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[0-9]{1,20}")
_MAX_COUNT = 2**32 - 1
_NUM_DRAFTS = "speculation.num_tokens"


@dataclass(frozen=True, slots=True)
class Fields:
    """Fields of ``SamplingParams`` or another of a request's parts, by name, before a task's defaults are known.

    Attributes:
        given: those that the caller set.
        otherwise: what the transport takes for those that neither the caller nor the task decides.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    otherwise: Mapping[str, Any] = field(default_factory=dict)

    def over(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """All of them; what the caller set wins over the task's defaults."""
        return {**self.otherwise, **defaults, **self.given}


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """A version's defaults: fields of ``SamplingParams``, ``StoppingParams`` and ``SpeculationParams``, by name."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stopping: Mapping[str, Any] = field(default_factory=dict)
    speculation: Mapping[str, Any] = field(default_factory=dict)


def read_defaults(labels: Mapping[str, str]) -> TaskDefaults:
    """The defaults among a version's labels.

    Raises:
        ArgumentInvalidError: there is no such default, or its value is out of range; names the label.
    """
    sampling: dict[str, Any] = {}
    stopping: dict[str, Any] = {}
    speculation: dict[str, Any] = {}
    for key, value in labels.items():
        name = key.removeprefix(DEFAULT)
        if not key.startswith(DEFAULT) or key.startswith(STOP):
            continue
        if name == "max_tokens":
            stopping["max_new_tokens"] = _checked(key, StoppingParams, "max_new_tokens", _count(key, value))
        elif name == _NUM_DRAFTS:
            speculation["num_tokens"] = _checked(key, SpeculationParams, "num_tokens", _count(key, value))
        elif name in _SAMPLING:
            sampling[name] = _checked(key, SamplingParams, name, _SAMPLING[name](key, value))
        else:
            raise label_error(key, f"is not a default; these are: {_NAMES}")
    stops = listed(labels, STOP)
    for number, text in enumerate(stops):
        _checked(f"{STOP}{number}", StoppingParams, "stop_sequences", (text,))
    if stops:
        stopping["stop_sequences"] = _checked(f"{STOP}N", StoppingParams, "stop_sequences", stops)
    return TaskDefaults(sampling, stopping, speculation)


def _checked(key: str, params: Callable[..., object], name: str, value: Any) -> Any:
    """A value that the request's own check accepts."""
    try:
        params(**{name: value})
    except FieldInvalidError as error:
        raise label_error(key, error.description) from error
    return value


def _number(key: str, text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise label_error(key, f"must be a number, not {text!r}")
    return float(text)


def _whole(key: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise label_error(key, f"must be a whole number from 0, not {text!r}")
    return int(text)


def _count(key: str, text: str) -> int:
    number = _whole(key, text)
    if number > _MAX_COUNT:
        raise label_error(key, f"must be at most {_MAX_COUNT}, not {text}")
    return number


_SAMPLING: Mapping[str, Callable[[str, str], float]] = MappingProxyType(
    {
        "temperature": _number,
        "top_p": _number,
        "top_k": _count,
        "min_p": _number,
        "typical_p": _number,
        "repetition_penalty": _number,
        "presence_penalty": _number,
        "frequency_penalty": _number,
        "seed": _whole,
    }
)
_NAMES = ", ".join(DEFAULT + name for name in (*_SAMPLING, "max_tokens", "stop.N", _NUM_DRAFTS))
