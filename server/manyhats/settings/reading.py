"""Values as people write them, in files, variables and flags → dataclasses of settings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from manyhats.settings.declaration import Setting, own_settings, sections_of
from manyhats.settings.sizes import parse_size

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How a package says that a setting is wrong.

    Attributes:
        error: from the setting's name and what is wrong.
        shows_value: whether a value out of its range is repeated.
        words: of pydantic → of the package.
    """

    error: Callable[[str, str], Exception]
    shows_value: bool = False
    words: Mapping[str, str] = field(default_factory=dict)

    def out_of_range(self, name: str, problem: str, value: object) -> Exception:
        """The error about a value."""
        return self.error(name, f"{problem}, not {value!r}" if self.shows_value else problem)

    def plain(self, message: str) -> str:
        """What pydantic says, in the package's words."""
        for theirs, ours in self.words.items():
            message = message.replace(theirs, ours)
        return message[:1].lower() + message[1:]


def check(config: Any, wording: Wording) -> None:
    """Hold the settings of a dataclass, sections aside, to their ranges; for its ``__post_init__``.

    Raises:
        the wording's error: about the first that is out of its range.
    """
    kind: Any = type(config)
    for each in own_settings(kind):
        value = getattr(config, each.field)
        problem = each.problem(value)
        if problem:
            raise wording.out_of_range(each.field, problem, value)


def make(kind: Callable[..., Config], values: Mapping[str, Any], wording: Wording, **made: Any) -> Config:
    """A dataclass of settings and its sections.

    Args:
        kind: the dataclass.
        values: setting → value, converted where nothing is lost, such as the text ``1e-4`` to a number; those that are
            no settings of it are ignored.
        wording: of the errors.
        made: fields that are made already: those that are no settings, and sections of several types.

    Raises:
        the wording's error: a value has the wrong type, or is out of its range.
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
        raise wording.error(where, wording.plain(first["msg"])) from error
    problem = each.problem(converted)
    if problem:
        raise wording.out_of_range(each.name, problem, converted)
    return converted


def _prepared(each: Setting, value: Any, wording: Wording) -> Any:
    """The value, as pydantic understands it.

    YAML reads ``yes`` as true and one word of a list as a text; pydantic would take true for 1.
    """
    if isinstance(value, bool) and each.kind is not bool:
        raise wording.error(each.name, f"must not be {str(value).lower()}; quote a word that YAML takes so")
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
    """The setting of a file's key, which may be named as its flag is, with dashes and in the singular."""
    plain = key.replace("-", "_")
    return next((each.name for each in known if plain == each.flag.replace("-", "_")), plain)


def by_name(
    content: Mapping[str, Any], known: Collection[Setting], error: Callable[[str, str], Exception]
) -> dict[str, Any]:
    """A file's settings by their names, see ``name_of``.

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
    """What is said of a name that is no setting."""
    by_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return f"is not a setting; did you mean {by_case[near[0]]}?" if near else "is not a setting"
