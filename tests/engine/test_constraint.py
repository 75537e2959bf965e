"""Constraints refuse what they can without knowing any grammar library."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manyhats.engine.constraint import (
    MAX_CHOICES,
    MAX_SCHEMA_DEPTH,
    MAX_SOURCE_BYTES,
    MAX_TOOLS_BYTES,
    Constraint,
)
from manyhats.engine.errors import FieldInvalidError


def nested(depth: int) -> str:
    return '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", '{"type": "object"}'),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}'),
        ("json_schema", '{"properties": {"$ref": {"type": "string"}}}'),
        ("json_schema", '{"const": {"$ref": "https://example.com"}}'),
        ("json_schema", nested(MAX_SCHEMA_DEPTH)),
        ("regex", "a" * MAX_SOURCE_BYTES),
        ("grammar", 'start: "a"'),
        ("choice", ("yes", "no")),
        ("choice", ["a"] * MAX_CHOICES),
        ("tools", ("start: @schema_0", '{"type": "object"}')),
        ("tools", ("start: @schema_0", *[json.dumps({"title": "x" * (MAX_SOURCE_BYTES - 20)})] * 5)),
    ],
)
def test_constraints_within_bounds_are_accepted(kind: Any, source: Any) -> None:
    assert Constraint(kind, source).texts


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        ("json_schema", "", "must not be empty"),
        ("json_schema", "{", "is not JSON"),
        ("json_schema", "[]", "is not a JSON object"),
        ("json_schema", '{"minimum": NaN}', "NaN"),
        ("json_schema", '{"minimum": 1e999}', "out of range"),
        ("json_schema", '{"type": "string", "type": "null"}', "repeats the key 'type'"),
        ("json_schema", '{"const": "\\ud800"}', "surrogate"),
        ("json_schema", nested(MAX_SCHEMA_DEPTH + 1), "deeper than the limit of 32"),
        ("json_schema", '{"items": [{"$ref": "https://example.com/s.json"}]}', "must stay within the schema"),
        ("json_schema", '{"$ref": "other.json#/a"}', "must stay within the schema"),
        ("json_schema", json.dumps({"title": "x" * MAX_SOURCE_BYTES}), "the limit is 65536"),
        ("json_schema", ('{"type": "null"}',), "must be one text"),
        ("regex", "", "must not be empty"),
        ("regex", "é" * (MAX_SOURCE_BYTES // 2 + 1), "has 65538 bytes; the limit is 65536"),
        ("regex", "\ud800", "surrogate"),
        ("grammar", "x" * (MAX_SOURCE_BYTES + 1), "the limit is 65536"),
        ("choice", "yes", "must be a list of texts"),
        ("choice", (), "must be 1 to 1024 texts, not 0"),
        ("choice", ("a", ""), "must not be empty"),
        ("choice", ["a"] * (MAX_CHOICES + 1), "must be 1 to 1024 texts, not 1025"),
        ("choice", ("x" * MAX_SOURCE_BYTES, "y"), "the limit is 65536"),
        ("tools", "start: @schema_0", "must be a list of texts"),
        ("tools", ("x" * MAX_TOOLS_BYTES, "{}"), "the limit is 393216"),
    ],
)
def test_what_is_refused_is_named(kind: Any, source: Any, problem: str) -> None:
    with pytest.raises(FieldInvalidError) as refused:
        Constraint(kind, source)
    assert refused.value.field == kind
    assert problem in refused.value.description


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ("{", "is not JSON"),
        (nested(MAX_SCHEMA_DEPTH + 1), "deeper than the limit of 32"),
        (json.dumps({"title": "x" * MAX_SOURCE_BYTES}), "the limit is 65536"),
        ('{"$ref": "other.json#/a"}', "must stay within the schema"),
    ],
)
def test_of_several_schemas_the_bad_one_is_named(schema: str, problem: str) -> None:
    with pytest.raises(FieldInvalidError) as refused:
        Constraint("tools", ("start: @schema_0", "{}", schema))
    assert refused.value.field == "tools[1]"
    assert problem in refused.value.description


def test_only_equal_constraints_share_a_digest() -> None:
    constraints = [
        Constraint("regex", "a"),
        Constraint("grammar", "a"),
        Constraint("choice", ("a",)),
        Constraint("choice", ("a", "b")),
        Constraint("choice", ("ab",)),
    ]
    assert len({each.digest for each in constraints}) == len(constraints)
    assert Constraint("choice", ["a", "b"]).digest == Constraint("choice", ("a", "b")).digest
