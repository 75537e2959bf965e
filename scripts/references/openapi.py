"""The HTTP API's routes and messages, from docs/openapi.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from references.markdown import table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/openapi.json"
Schema = Mapping[str, Any]


def markdown(document: Mapping[str, Any] | None = None) -> str:
    """All routes, then all messages; by default those of docs/openapi.json."""
    found = document or json.loads(DOCUMENT.read_text(encoding="utf-8"))
    parts = ["## Routes\n"]
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            parts += _route(f"{method.upper()} {path}", operation, found["components"])
    parts.append("## Messages\n")
    for name, schema in found["components"]["schemas"].items():
        parts += _message(name, schema)
    return "\n".join(parts)


def _route(title: str, operation: Mapping[str, Any], components: Mapping[str, Any]) -> Iterator[str]:
    yield f"### `{title}`\n\n{operation['summary']}\n"
    contents = operation.get("requestBody", {}).get("content", {})
    bodies = [f"{_type(each.get('schema', {}))} ({kind})" for kind, each in contents.items()]
    if bodies:
        yield f"Body: {' or '.join(bodies)}.\n"
    listed = [_resolved(each, components) for each in operation.get("parameters", ())]
    rows = [
        (f"`{each['name']}`", each["in"], f"{_type(each['schema'])}. {each.get('description', '')}")
        for each in listed
    ]
    yield table("parameter", "in", "", rows=rows)
    yield table("status", "body", "", rows=(_answer(*each) for each in operation["responses"].items()))


def _resolved(parameter: Mapping[str, Any], components: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter that may stand among the document's common ones."""
    name = parameter.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = components["parameters"][name] if name else parameter
    return found


def _answer(status: str, answer: Mapping[str, Any]) -> tuple[str, str, str]:
    bodies = []
    for kind, each in answer.get("content", {}).items():
        text = _type(each.get("schema", {})) if kind == "application/json" else f"`{kind}`"
        bodies.append(f"{text}{_events(each['schema'])}" if kind == "text/event-stream" else text)
    return status, " or ".join(bodies), answer.get("description", "")


def _events(schema: Schema) -> str:
    """What the events of a stream hold."""
    kinds = [each.get("contentSchema", {}) for each in schema["properties"]["data"].get("anyOf", ())]
    named = [_type(each) for each in kinds if each]
    return f" of {' or '.join(named)}" if named else ""


def _message(name: str, schema: Schema) -> Iterator[str]:
    yield f"(http-{name})=\n### {name}\n\n{schema.get('description', '')}\n"
    required = set(schema.get("required", ()))
    rows = []
    for field, kind in schema.get("properties", {}).items():
        told = [kind.get("description", ""), _bounds(kind), "" if field not in required else "Required."]
        rows.append((f"`{field}`", _type(kind), " ".join(each for each in told if each)))
    yield table("field", "type", "", rows=rows)


def _bounds(schema: Schema) -> str:
    """Least, most and default, as far as they are said."""
    told = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "At least"), ("maximum", "at most"))
        if key in schema
    ]
    default = schema.get("default")
    if default not in (None, "", [], {}):
        told.append(f"{'default' if told else 'Default'} `{json.dumps(default)}`")
    return f"{', '.join(told)}." if told else ""


def _type(schema: Schema) -> str:
    """A type in a few words, with links to messages."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#http-{name})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        named = [_type(each) for each in choices if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(named))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    kind = schema.get("type", "anything")
    return kind if isinstance(kind, str) else " or ".join(each for each in kind if each != "null")
