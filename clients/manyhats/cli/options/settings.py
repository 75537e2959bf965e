"""Options of commands, from settings as they are declared."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Union, get_args

import typer

from manyhats.cli.terminal.failures import UsageError
from manyhats.settings.declaration import Setting
from manyhats.settings.reading import check_variables, read_variables

# Of commands that talk to a server, of every command, and of this one.
_OTHER_VARIABLES = frozenset(
    f"MANYHATS_{name}"
    for name in ("SERVER", "TOKEN", "TLS", "TLS_CA", "TLS_CERT", "TLS_KEY", "HOME", "DEBUG", "CONFIG")
)


def takes(**groups: Iterable[Setting] | type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of a group, instead of the parameter named like the group.

    The command gets the group's settings that are given, by their names, as texts, numbers or lists of texts. A group
    may also be a dataclass with a field for each option, of which it gets an instance.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        options = {name: _parameters(group) for name, group in groups.items()}

        @functools.wraps(command)
        def expanded(**values: Any) -> None:
            for name, group in groups.items():
                given = {each.name: values.pop(each.name) for each in options[name]}
                values[name] = group(**given) if isinstance(group, type) else _given(given)
            command(**values)

        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            parameters += options.get(name, [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)])
        expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {each.name: each.annotation for each in parameters}
        return expanded

    return decorated


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, [])}


def _parameters(group: Iterable[Setting] | type) -> list[inspect.Parameter]:
    if isinstance(group, type):
        fields = inspect.signature(group, eval_str=True).parameters.values()
        return [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in fields]
    return [_parameter(each) for each in group]


def _parameter(each: Setting) -> inspect.Parameter:
    """The option of a setting, None or an empty list if it is not given; values are checked with all others."""
    is_switch = each.kind is bool
    kind = list[str] if each.has_several else each.kind if each.kind in (bool, int, float) else str
    if each.declared.unit == "bytes":
        kind = str
    option = typer.Option(
        f"--{each.flag}/--no-{each.flag}" if is_switch else f"--{each.flag}",
        metavar=None if is_switch else each.metavar,
        help=each.declared.help,
        show_default=each.shown_default or False,
        rich_help_panel=each.declared.group,
    )
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Union[kind, None], option],  # noqa: UP007 - a type that is a value
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """Settings of flags and variables.

    Attributes:
        values: setting → what it is given as; entries of a mapping are read.
        places: setting → the flag or variable.
    """

    values: Mapping[str, Any]
    places: Mapping[str, str]

    @classmethod
    def of(
        cls, settings: Iterable[Setting], flags: Mapping[str, Any], environment: Mapping[str, str]
    ) -> Given:
        """Flags win over variables.

        Raises:
            UsageError: a variable is none of a setting's, or an entry of a mapping is malformed.
        """
        by_name = {each.name: each for each in settings}
        variables = read_variables(by_name.values(), environment)
        places = {name: by_name[name].variable for name in variables} | {
            name: f"--{by_name[name].flag}" for name in flags if name in by_name
        }
        values = {**variables, **flags}
        for name, place in places.items():
            if by_name[name].is_mapping:
                values[name] = read_entries(by_name[name], place, values[name])
        return cls(values, places)


def read_entries(each: Setting, place: str, texts: list[str]) -> dict[str, str]:
    """The texts of a setting that is a mapping, such as ``TASK=PATH``, as one; a number's text has no ``=``.

    Raises:
        UsageError: one is not of that form, or a key comes twice; names the place.
    """
    is_number = get_args(each.type)[1] is not str
    parts = (text.rpartition("=") if is_number else text.partition("=") for text in texts)
    return as_mapping(place, each.metavar, parts)


def refuse_unknown_variables(environment: Mapping[str, str], *commands: Iterable[Setting]) -> None:
    """Refuse variables that begin as settings' do, and are none of these commands'.

    Raises:
        UsageError: there is one.
    """
    known = {each.variable for settings in commands for each in settings} | _OTHER_VARIABLES
    check_variables(environment, known, lambda name, problem: UsageError(f"{name}: {problem}"))


def as_mapping(flag: str, form: str, parts: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """The texts of an option as a mapping.

    Args:
        flag: named in errors.
        form: of one text, such as ``TASK=PATH``.
        parts: each text split at its ``=``, the first or the last one.

    Raises:
        UsageError: one is not of that form, or a key comes twice.
    """
    parsed: dict[str, str] = {}
    for key, equals, value in parts:
        if not (key and value):
            raise UsageError(f"{flag} must be {form}, not {key + equals + value!r}")
        if key in parsed:
            raise UsageError(f"{flag} names {key} twice")
        parsed[key] = value
    return parsed
