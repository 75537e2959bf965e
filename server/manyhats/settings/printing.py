"""Settings as text: a file that can be read again, and tables for the documentation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from manyhats.settings.declaration import Setting
from manyhats.settings.sizes import size_text

_PASSWORD = re.compile(r"(://[^/@:\s]*:)[^/@\s]+(?=@)")
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&\s]*(?:password|secret|token|key|signature)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)
_HIDDEN = "***"


def config_text(known: Iterable[Setting], values: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """A settings file, in which a comment after each setting says where it comes from.

    Passwords and keys in URLs are replaced: such settings cannot be used as printed, and their comments say so.

    Args:
        known: the settings, in order.
        values: setting → value; missing ones are left out.
        places: setting → the flag, variable or file that sets it; the others are defaults.
    """
    lines = []
    for each in known:
        if each.name in values:
            value = _plain(each, values[each.name])
            shown = without_secrets(value)
            place = places.get(each.name, "default")
            note = "" if shown == value else "; secrets in it are left out"
            lines.append(f"{each.name}: {_yaml(shown)}  # {place}{note}\n")
    return "".join(lines)


def _plain(each: Setting, value: Any) -> Any:
    """The value in YAML."""
    if each.declared.unit == "bytes" and value is not None:
        return size_text(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [str(part) for part in value]
    return dict(value) if isinstance(value, Mapping) else value


def without_secrets(value: Any) -> Any:
    """The value with passwords and keys in its URLs replaced."""
    if isinstance(value, str):
        return _SECRET_PARAMETER.sub(rf"\1{_HIDDEN}", _PASSWORD.sub(rf"\1{_HIDDEN}", value))
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items()}
    return value


def _yaml(value: Any) -> str:
    """A value on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def table(known: Iterable[Setting]) -> str:
    """Markdown: a table for each group, a row for each setting."""
    groups: dict[str, list[Setting]] = {}
    for each in known:
        groups.setdefault(each.declared.group, []).append(each)
    return "\n".join(
        f"### {title}\n\n| setting | flag | default | |\n|---|---|---|---|\n" + "".join(map(_row, settings))
        for title, settings in groups.items()
    )


def _row(each: Setting) -> str:
    is_switch = each.kind is bool
    flag = f"--{each.flag}" if is_switch else f"--{each.flag} {each.metavar}"
    cells = (f"`{each.name}`", f"`{flag}`", each.shown_default, each.declared.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
