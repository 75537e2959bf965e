"""What language an answer must be in: frozen, and checked on creation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from manyhats.adapters.errors import ArtifactError
from manyhats.adapters.formats.json_reader import parse_json_object
from manyhats.engine.errors import FieldInvalidError

ConstraintKind = Literal["json_schema", "regex", "grammar", "choice", "tools"]

MAX_SOURCE_BYTES = 64 * 1024
MAX_TOOLS_BYTES = 384 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 1024

# Their values are data, in which "$ref" is an ordinary name.
_DATA_KEYWORDS = frozenset({"const", "enum", "default", "example", "examples"})


@dataclass(frozen=True)
class Constraint:
    """The answer's text must be a word of this language. Its source is at most 64 KiB of UTF-8, of ``tools`` 384 KiB.

    Attributes:
        kind: of the source; also the field that its errors name.
        source: for ``json_schema`` the text of a schema, a JSON object without repeated keys, at most 32 deep, whose
            references stay within it; for ``regex`` an expression that the whole answer matches; for ``grammar`` a
            grammar in Lark's notation that begins at ``start``; for ``choice`` the possible answers, 1 to 1024; for
            ``tools`` such a grammar, and after it JSON schemas that it refers to as ``@schema_0`` and so on.

    Raises:
        FieldInvalidError: the source is over a bound, or cannot be read; names the kind, and the schema if there are
            several, as ``tools[1]``. What the grammar library refuses comes later.
    """

    kind: ConstraintKind
    source: str | Sequence[str]

    def __post_init__(self) -> None:
        is_list = self.kind in ("choice", "tools")
        if isinstance(self.source, str) == is_list:
            raise FieldInvalidError(self.kind, f"must be {'a list of texts' if is_list else 'one text'}")
        if not isinstance(self.source, str):
            if not 1 <= len(self.source) <= MAX_CHOICES:
                raise FieldInvalidError(
                    self.kind, f"must be 1 to {MAX_CHOICES} texts, not {len(self.source)}"
                )
            object.__setattr__(self, "source", tuple(self.source))
        num_bytes = sum(len(self._encoded(text)) for text in self.texts)
        limit = MAX_TOOLS_BYTES if self.kind == "tools" else MAX_SOURCE_BYTES
        if num_bytes > limit:
            raise FieldInvalidError(self.kind, f"has {num_bytes} bytes; the limit is {limit}")
        if not all(self.texts):
            raise FieldInvalidError(self.kind, "must not be empty")
        for index, schema in enumerate(self.schemas):
            self._check_schema(schema, f"tools[{index}]" if self.kind == "tools" else self.kind)

    @property
    def texts(self) -> tuple[str, ...]:
        """The source as texts: the choices, or the one it is."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def schemas(self) -> tuple[str, ...]:
        """The JSON schemas in the source."""
        return {"json_schema": self.texts, "tools": self.texts[1:]}.get(self.kind, ())

    @property
    def is_exact(self) -> bool:
        """Whether an answer's text must be in the language to the last space; of one with calls only those need be."""
        return self.kind != "tools"

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal constraints only."""
        return hashlib.sha256(json.dumps([self.kind, *self.texts]).encode()).digest()

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:
            raise FieldInvalidError(self.kind, "has half of a surrogate pair, which is not text") from None

    def _check_schema(self, text: str, field: str) -> None:
        try:
            schema = parse_json_object(
                text.encode(), field, max_bytes=MAX_SOURCE_BYTES, max_depth=MAX_SCHEMA_DEPTH
            )
        except ArtifactError as error:
            raise FieldInvalidError(field, error.description) from None
        for reference in _references(schema):
            if not reference.startswith("#"):
                raise FieldInvalidError(
                    field,
                    f"refers to {reference[:200]!r}; a $ref must stay within the schema and begin with '#'",
                )


def _references(schema: Any) -> Iterator[str]:
    """All references in a schema; a property may also have their name, but its value is no text."""
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str):
                yield value
            elif key not in _DATA_KEYWORDS:
                yield from _references(value)
