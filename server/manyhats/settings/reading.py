"""Values as people write them, in files, variables and flags → dataclasses of settings."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from manyhats.settings.declaration import Setting, own_settings, sections_of
from manyhats.settings.sizes import parse_size

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Config = TypeVar("Config")

PREFIX = "MANYHATS_"
_PLAIN = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "path_type": "must be a path",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}
"""What a value must be, by pydantic's types of errors; others are told in its words."""
# What Kubernetes sets in every container for a Service called manyhats.
_SERVICE_LINK = re.compile(r"MANYHATS_(SERVICE_(HOST|PORT)|PORT)(_|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How a package reports that a setting is wrong.

    Attributes:
        error: made from the setting's name and what is wrong.
        shows_value: whether a value out of range is repeated.
        words: pydantic's → the package's.
    """

    error: Callable[[str, str], Exception]
    shows_value: bool = False
    words: Mapping[str, str] = field(default_factory=dict)

    def out_of_range(self, name: str, problem: str, value: object) -> Exception:
        """The error about a value."""
        return self.error(name, f"{problem}, not {value!r}" if self.shows_value else problem)

    def plain(self, message: str) -> str:
        """Pydantic's message, in the package's words."""
        for theirs, ours in self.words.items():
            message = message.replace(theirs, ours)
        return message[:1].lower() + message[1:]


def check(config: Any, wording: Wording) -> None:
    """Check that the settings of a dataclass, without sections, are in range; for its ``__post_init__``.

    Raises:
        the wording's error: for the first that is out of range.
    """
    kind: Any = type(config)
    for each in own_settings(kind):
        value = getattr(config, each.field)
        problem = each.problem(value)
        if problem:
            raise wording.out_of_range(each.field, problem, value)


def make(kind: Callable[..., Config], values: Mapping[str, Any], wording: Wording, **made: Any) -> Config:
    """Build a dataclass of settings and its sections.

    Args:
        kind: the dataclass.
        values: setting → value, converted if nothing is lost, such as the string ``1e-4`` to a number; unknown ones are
            ignored.
        wording: the errors'.
        made: fields built beforehand: those that are not settings, and sections of several types.

    Raises:
        the wording's error: a value has the wrong type, or is out of range.
    """
    given = {
        each.field: _converted(each, values[each.name], wording)
        for each in own_settings(kind)
        if each.name in values
    }
    sections = {name: each for name, each in sections_of(kind).items() if name not in made}
    given |= {name: make(section, values, wording) for name, section in sections.items()}
    return kind(**given, **made)


def _converted(each: Setting, value: Any, wording: Wording) -> Any:
    from pydantic import ValidationError

    try:
        converted = _adapter(each.type).validate_python(_prepared(each, value, wording))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join((each.name, *map(str, first["loc"])))
        if first["type"] in _PLAIN:
            raise wording.out_of_range(where, _PLAIN[first["type"]], first["input"]) from error
        raise wording.error(where, wording.plain(first["msg"])) from error
    problem = each.problem(converted)
    if problem:
        raise wording.out_of_range(each.name, problem, converted)
    return converted


def _prepared(each: Setting, value: Any, wording: Wording) -> Any:
    """The value as pydantic reads it.

    YAML reads ``yes`` as true and a one-word list as a string; pydantic would accept true as 1.
    """
    if isinstance(value, bool) and each.kind is not bool:
        raise wording.error(
            each.name, f"must not be {str(value).lower()}; quote a word that YAML reads this way"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise wording.error(each.name, "must be a finite number")
    if isinstance(value, str) and each.kind is tuple:
        return (value,)
    if isinstance(value, str) and each.declared.unit == "bytes":
        try:
            return parse_size(value)
        except ValueError as error:
            raise wording.error(each.name, str(error)) from error
    return value


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def name_of(key: str, known: Iterable[Setting]) -> str:
    """The setting of a file's key, which may be named like its flag, with dashes and in the singular."""
    plain = key.replace("-", "_")
    return next((each.name for each in known if plain == each.flag.replace("-", "_")), plain)


def by_name(
    content: Mapping[str, Any], known: Collection[Setting], error: Callable[[str, str], Exception]
) -> dict[str, Any]:
    """A file's settings by name, see ``name_of``.

    Raises:
        ``error``: a setting appears twice.
    """
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = name_of(key, known)
        if name in settings:
            raise error(name, "is given twice")
        settings[name] = value
    return settings


def not_a_setting(name: str, known: Iterable[str]) -> str:
    """The message for a name that is not a setting."""
    by_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return f"is not a setting; did you mean {by_case[near[0]]}?" if near else "is not a setting"


def read_variables(known: Iterable[Setting], environment: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Setting → its variable's value; the parts between commas if it has several values.

    An empty variable counts as not given.
    """
    given: dict[str, str | list[str]] = {}
    for each in known:
        text = environment.get(each.variable, "")
        if text:
            has_several = each.has_several
            given[each.name] = [part.strip() for part in text.split(",")] if has_several else text
    return given


def check_variables(
    environment: Mapping[str, str], known: Collection[str], error: Callable[[str, str], Exception]
) -> None:
    """Refuse variables that begin like those of settings but are not settings.

    Args:
        environment: name → value.
        known: names of valid variables.
        error: made from a variable's name and what is wrong.

    Raises:
        ``error``: there is one; names the nearest valid one.
    """
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and environment[name]:
            hint = (
                "; Kubernetes sets it for a Service called manyhats, unless the pod has enableServiceLinks: false"
                if _SERVICE_LINK.match(name)
                else ""
            )
            raise error(name, not_a_setting(name, known) + hint)
