"""Declares a setting once, on a dataclass field: flags, variables, files, checks and docs follow from it."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from manyhats.settings.sizes import size_text

_KEY = "setting"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Declared:
    """What ``setting`` is given besides the default; see there."""

    help: str
    group: str = ""
    name: str = ""
    flag: str = ""
    metavar: str = ""
    shown: str = ""
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    must: str = ""


def setting(default: Any = MISSING, *, factory: Callable[[], Any] | None = None, **declared: Any) -> Any:
    """A field that is a setting.

    Args:
        default: the field's; without it and ``factory`` the setting is required.
        factory: makes the default.
        declared: by keyword

            - ``help``: what it is, in a sentence or less.
            - ``group``: the title it is shown under, with others.
            - ``name``: in files and variables, if not the field's.
            - ``flag``: if not ``name`` with dashes; singular for a setting with several values.
            - ``metavar``: what the flag's value is called; for a mapping, the form of one entry.
            - ``shown``: the default for people, if the value says too little.
            - ``unit``: ``seconds``, or ``bytes``, which may be written as sizes such as 1GiB.
            - ``at_least``, ``at_most``, ``above``, ``below``: bounds of a number; they do not apply to None.
            - ``must``: the message for a number out of bounds, instead of naming the bound.
    """
    metadata = {_KEY: _Declared(**declared)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One declared setting.

    Attributes:
        name: in files.
        field: the dataclass field.
        type: the value's.
        default: MISSING if it is required.
        declared: the rest.
    """

    name: str
    field: str
    type: Any
    default: Any
    declared: _Declared

    @property
    def flag(self) -> str:
        """The flag without its leading dashes."""
        return (self.declared.flag or self.name).replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"MANYHATS_{self.name.upper()}"

    @property
    def kind(self) -> Any:
        """The type without None, type arguments and alternatives to a string."""
        (kind, *others) = [each for each in _members(self.type) if each is not types.NoneType]
        return str if others else get_origin(kind) or kind

    @property
    def is_mapping(self) -> bool:
        """Whether a value is a mapping from strings to strings or numbers."""
        return self.kind in (dict, Mapping)

    @property
    def has_several(self) -> bool:
        """Whether a value is a list or a mapping, so that a flag may be given several times."""
        return self.kind is tuple or self.is_mapping

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, if they can be listed; otherwise empty."""
        return get_args(self.type) if self.kind is Literal else ()

    @property
    def metavar(self) -> str:
        """What a value is called."""
        by_kind = {int: "N", float: "X"}
        by_unit = {"bytes": "SIZE", "seconds": "SECONDS"}
        known = self.declared.metavar or "|".join(self.choices) or by_unit.get(self.declared.unit)
        return known or by_kind.get(self.kind, "TEXT")

    @property
    def shown_default(self) -> str:
        """The default for people; empty if there is none, or an empty one."""
        value = self.default
        if self.declared.shown:
            return self.declared.shown
        if self.kind is bool:
            return self.flag if value else f"no-{self.flag}"
        if value is MISSING or (not value and self.kind not in (int, float)):
            return ""
        if self.declared.unit == "bytes":
            return "" if value is None else size_text(value)
        return ", ".join(value) if self.kind is tuple else "" if value is None else str(value)

    def problem(self, value: Any) -> str:
        """What is wrong with a value of its type; empty if nothing."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.kind not in (int, float) or value is None:
            return ""
        broken = _broken_bound(self.declared, value)
        return broken and (self.declared.must or f"must be {broken}")


def _broken_bound(declared: _Declared, x: float) -> str:
    """The bound that a number violates; empty if none, or if it is not a number."""
    least, most, above, below = declared.at_least, declared.at_most, declared.above, declared.below
    if least is not None and below is not None and not least <= x < below:
        return f"at least {least:g} and below {below:g}"
    if least is not None and not x >= least:
        return f"at least {least:g}"
    if above is not None and not above < x < math.inf:
        return f"more than {above:g} seconds" if declared.unit == "seconds" else f"above {above:g}"
    if most is not None and not x <= most:
        return f"at most {most:.0f}"
    return ""


@cache
def settings_of(kind: Any) -> tuple[Setting, ...]:
    """The settings of a dataclass and its sections, the first of each name; for a union, those of each member."""
    found: dict[str, Setting] = {}
    for member in _members(kind):
        inner = [each for section in sections_of(member).values() for each in settings_of(section)]
        for each in (*own_settings(member), *inner):
            found.setdefault(each.name, each)
    return tuple(found.values())


def grouped(kind: Any, groups: Sequence[str]) -> tuple[Setting, ...]:
    """``settings_of`` by group, in the order of the groups."""
    return tuple(sorted(settings_of(kind), key=lambda each: groups.index(each.declared.group)))


@cache
def own_settings(kind: Any) -> tuple[Setting, ...]:
    """The settings of a dataclass itself."""
    hints = get_type_hints(kind)
    declared = [each for each in dataclasses.fields(kind) if _KEY in each.metadata]
    return tuple(_setting(each, hints[each.name], each.metadata[_KEY]) for each in declared)


@cache
def sections_of(kind: Any) -> dict[str, Any]:
    """Field → type, for the fields of a dataclass that are themselves dataclasses, or unions of them."""
    hints = get_type_hints(kind)
    fields = [each.name for each in dataclasses.fields(kind) if _KEY not in each.metadata]
    return {name: hints[name] for name in fields if all(map(dataclasses.is_dataclass, _members(hints[name])))}


def values_of(config: Any) -> dict[str, Any]:
    """Setting → value, for a dataclass and the dataclasses among its fields."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if _KEY in field.metadata:
            values[field.metadata[_KEY].name or field.name] = value
        elif dataclasses.is_dataclass(value):
            values |= values_of(value)
    return values


def _setting(field: dataclasses.Field[Any], hint: Any, declared: _Declared) -> Setting:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return Setting(
        name=declared.name or field.name, field=field.name, type=hint, default=default, declared=declared
    )


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
