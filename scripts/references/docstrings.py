"""Docstrings as Sphinx wants them, which here are plain text with ``code``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

_KEYS = re.compile(r"^Keys(?:, (.+))?:$")
_KEY = re.compile(r"^    (\w+): (.*)$")


def readable(lines: list[str]) -> list[str]:
    """Trees and code that is set off by its indentation as blocks, and keys of a dictionary as a list."""
    return list(_keys_as_list(_indented_as_code(list(_trees_as_blocks(lines)))))


def _trees_as_blocks(lines: list[str]) -> Iterator[str]:
    """A tree, drawn with lines from its root to the next empty line."""
    is_tree = False
    for line, following in pairwise([*lines, ""]):
        if following.startswith("├") and not is_tree:
            is_tree = True
            yield from (".. code-block:: text", "")
        is_tree = is_tree and bool(line)
        yield f"    {line}" if is_tree else line


def _indented_as_code(lines: list[str]) -> list[str]:
    """Indented lines after an empty one, where what is before them is a sentence."""
    made: list[str] = []
    for index, line in enumerate(lines):
        before = lines[index - 2] if index > 1 and not lines[index - 1].strip() else ""
        if (
            line.startswith("    ")
            and before.endswith((".", ":"))
            and not before.startswith((" ", "Example"))
        ):
            made += [".. code-block:: python", ""]
        made.append(line)
    return made


def _keys_as_list(lines: list[str]) -> Iterator[str]:
    """``Keys:`` and ``Keys, of some kind:``, as TypedDicts have them."""
    is_inside = False
    for line in lines:
        heading = _KEYS.match(line)
        if heading:
            is_inside = True
            yield from ("", f".. rubric:: {'Keys' if not heading[1] else f'Keys, {heading[1]}'}", "")
        elif is_inside and (key := _KEY.match(line)):
            yield f"* **{key[1]}** – {key[2]}"
        elif is_inside and line.startswith("        "):
            yield f"  {line.strip()}"
        else:
            is_inside = is_inside and not line.strip()
            yield line
