"""The commands and their options, as the program declares them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import typer

from manyhats.cli.main import app
from references.markdown import fence, plain, table

Command = Any
"""A command of Typer, whose own types are not public."""


def markdown() -> str:
    """All commands, by what they are for."""
    root = typer.main.get_command(app)
    panels: dict[str, list[str]] = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        text = "\n".join(_command(f"manyhats {name}", command, depth=3))
        panels.setdefault(command.rich_help_panel, []).append(text)
    return "\n".join(f"## {panel}\n\n{''.join(texts)}" for panel, texts in panels.items())


def _command(path: str, command: Command, depth: int) -> Iterator[str]:
    """A command and those below it."""
    yield f"({path.replace(' ', '-')})=\n{'#' * depth} `{path}`\n"
    yield _prose(command.help or "")
    below = getattr(command, "commands", None)
    if below is not None:
        for name, each in below.items():
            yield from _command(f"{path} {name}", each, depth + 1)
        return
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    usage = [each.metavar if each.required else f"[{each.metavar}]" for each in arguments]
    yield fence("text", " ".join([path, "[OPTIONS]", *usage]))
    rows = [(f"`{each.metavar}`", _meaning(each)) for each in arguments]
    yield table("argument", "", rows=rows)
    yield from _options(command)


def _options(command: Command) -> Iterator[str]:
    """A table for each panel of options."""
    panels: dict[str, list[tuple[str, ...]]] = {}
    for each in command.params:
        if each.param_type_name == "option" and not each.hidden and each.name != "help":
            names = ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))
            value = "" if each.is_flag else f" `{each.metavar or 'VALUE'}`"
            panels.setdefault(each.rich_help_panel or "Options", []).append((names + value, _meaning(each)))
    for panel, rows in panels.items():
        yield table(panel.lower() if panel == "Options" else panel, "", rows=rows)


def _meaning(parameter: Command) -> str:
    """What it does, and its default."""
    text = _with_code(_without_markup(parameter.help or ""))
    default = parameter.show_default
    if default is True:
        default = "" if parameter.default in (None, "", False, ()) else str(parameter.default)
    return f"{text} Default: {_with_code(default)}." if default else text


def _without_markup(text: str) -> str:
    """Help without Rich's marks."""
    return re.sub(r"(?<!\\)\[/?[a-z]+\]", "", text).replace("\\[", "[")


def _prose(text: str) -> str:
    """A command's help: headings in bold, calls as code."""
    blocks = re.split(r"\n\s*\n", text.strip())
    shown: list[str] = []
    for block in blocks:
        if block.startswith("[bold]"):
            shown.append(f"**{_without_markup(block)}**\n")
        elif block.startswith("  "):
            shown.append(fence("console", textwrap.dedent(_without_markup(block))))
        else:
            shown.append(_with_code(_without_markup(block)) + "\n")
    return "\n".join(shown)


def _with_code(text: str) -> str:
    """Text in which flags and variables are code."""
    return plain(re.sub(r"(?<![\w`-])(--[a-z][a-z-]*|MANYHATS_\w+(?:=\w+)?)", r"`\1`", text))
