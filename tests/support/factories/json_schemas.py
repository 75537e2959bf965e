"""Random JSON schemas whose answers are small enough for a model that prints at random."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES = st.sampled_from(["a", "b", "id", "näme", "x y", 'q"q', "e\\f"])
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-999, 999), st.sampled_from(["", "a", "Ü", '"', "\\", "a b"])
)
_PATTERNS = ("^[a-c]{1,4}$", "^(x|yz)?[0-9]{2}$", "^\\d{1,3}\\.\\d$", '^[^a-z"]{1,3}$', "é{2,3}$|^$")
_FORMATS = ("date", "time", "ipv4", "uuid")


@st.composite
def _strings(draw: st.DrawFn) -> Schema:
    shortest = draw(st.integers(0, 3))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 3))}


@st.composite
def _integers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-200, 200))
    bounds = {"minimum": low, "maximum": low + draw(st.integers(0, 300))}
    exclusive = {"exclusiveMinimum": low, "exclusiveMaximum": low + 2 + draw(st.integers(0, 300))}
    return {"type": "integer", **draw(st.sampled_from([bounds, exclusive]))}


_LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["boolean", "null"]}]),
    _strings(),
    _integers(),
    st.just({"type": "number", "minimum": -2.5, "maximum": 10}),
    st.sampled_from(_PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(_FORMATS).map(lambda name: {"type": "string", "format": name}),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    _VALUES.map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/shared"}),
)


def _arrays(items: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 1))
    lists = st.builds(
        lambda of, size: {"type": "array", "items": of, "minItems": size[0], "maxItems": sum(size)},
        items,
        sizes,
    )
    tuples = st.lists(items, min_size=1, max_size=2).map(
        lambda each: {"type": "array", "prefixItems": each, "items": False, "minItems": len(each)}
    )
    return lists | tuples


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_NAMES, values, max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _compound(schemas: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    alternatives = st.lists(schemas, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
    one_of = st.just({"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]})
    return st.one_of(_arrays(schemas), _objects(schemas), alternatives, one_of)


def json_schemas() -> st.SearchStrategy[Schema]:
    """Schemas of every kind that is supported, a few levels deep."""
    shared = _strings() | _integers()
    return st.builds(
        lambda schema, of: {**schema, "$defs": {"shared": of}},
        st.recursive(_LEAVES, _compound, max_leaves=6),
        shared,
    )
