"""A row as it was read, before it is interpreted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhats.trainer.errors import DataError

LISTS = ("tools", "functions", "documents")
KWARGS = "chat_template_kwargs"
FIELDS = ("prompt", "completion", "text", "messages", "system", *LISTS, KWARGS)
"""The fields that a row may have, if its text is to be continued."""
_OF_HEADS = ("text_pair", "label", "tokens", "tags", "query", "positive", "negatives")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        fields: by name; a null or an empty CSV cell may be None or missing.
        source: the file, or the name of the data set.
        line: where the row begins, from 1; the row's number if a source has no lines.
    """

    fields: Mapping[str, object]
    source: str
    line: int

    def error(self, message: str) -> DataError:
        """What is wrong with this row."""
        return DataError(self.source, self.line, message)


def check_columns(source: str, columns: Sequence[str]) -> None:
    """Check that a table's columns can make rows.

    Raises:
        DataError: a name appears twice, none is known, or there are prompts but no completions, or the reverse.
    """
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(source, None, f"has two columns named {twice[0]!r}")
    known = [name for name in columns if name in (*FIELDS, *_OF_HEADS)]
    if not known:
        raise DataError(
            source,
            None,
            f"has the columns {', '.join(columns)}, but none of {', '.join((*FIELDS, *_OF_HEADS))}",
        )
    lacking = {"prompt", "completion"} - set(known)
    if len(lacking) == 1 and {"text", "messages", "tokens", "query"}.isdisjoint(known):
        raise DataError(
            source, None, f"has no column {lacking.pop()!r}; its columns are {', '.join(columns)}"
        )
