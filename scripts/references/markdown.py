"""Pieces of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUTSIDE_CODE = re.compile(r"(`[^`]*`)")


def cell(text: str) -> str:
    """One cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def plain(text: str) -> str:
    """Text that has no markup but code in backticks, as Markdown."""
    parts = _OUTSIDE_CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#])", r"\\\1", part) for part in parts
    )


def table(*columns: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A table; nothing where there are no rows."""
    lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *lines]) + "\n"


def fence(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```\n"
