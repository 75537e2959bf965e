"""What requests give to be read or continued: a text, token ids, or a list of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.service.prompts import Prompt, TextPrompt, TokenPrompt

Input = str | list[str | int | list[int]]
"""A text, the token ids of one, or a list of either."""
RightOnly = Literal["Right", "right"]
"""Where TEI's ``truncate`` cuts: a text's beginning is what is read."""


def several(given: Input) -> Sequence[str | int | list[int]]:
    """What is given as a list, in which token ids that are one text are one list."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [given]  # type: ignore[list-item]
    return given


def as_prompts(
    given: Sequence[str | int | list[int]], field: str, *, add_special_tokens: bool = True
) -> list[Prompt]:
    """Texts and token ids as the service's; errors name them as in ``input[3]``, and a single one ``input``.

    Raises:
        FieldInvalidError: one is empty or too long, or neither a text nor token ids.
    """
    found: list[Prompt] = []
    for index, each in enumerate(given):
        name = f"{field}[{index}]" if len(given) > 1 else field
        if isinstance(each, str):
            found.append(TextPrompt(each, add_special_tokens=add_special_tokens, field=name))
        elif isinstance(each, list):
            found.append(TokenPrompt(each, field=name))
        else:
            raise FieldInvalidError(name, "must be a text or a list of token ids")
    return found
