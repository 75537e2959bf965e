"""The description of the HTTP port, as an OpenAPI document: https://spec.openapis.org/oas/v3.1.1.html."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from manyhats.server.http.body import ByteStream
from manyhats.server.http.multipart import FILE_FIELD, OPTIONS_FIELD
from manyhats.server.http.operation import Operation
from manyhats.server.http.probes import PROBES, is_ready, is_store_whole
from manyhats.server.http.status import KINDS, ErrorAnswer

_REF = "#/components/schemas/{name}"
_DESCRIPTION = """\
OpenAI's API, and vLLM's routes around it, on a server of many fine-tuned tasks: each task is a model.

Every answer that is an error has the body `ErrorAnswer`; `param` names the field. A stream that has begun ends in an
event with that body instead.
"""
_HEADERS = {
    "x-request-id": "The caller's own, or else the server's.",
    "x-manyhats-version": "The version of the task that answered, such as `sql@3`; none for the base model.",
}
_RETRY_HEADERS = {
    "retry-after": "Seconds after which to try again, rounded up.",
    "retry-after-ms": "The same in milliseconds.",
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "An id for the call, which its answer and the server's log repeat.",
    "schema": {"type": "string", "maxLength": 128},
}
_TRACEPARENT = {
    "name": "traceparent",
    "in": "header",
    "description": "W3C's: the trace that the call is part of; the log shows it, and spans are part of it.",
    "schema": {"type": "string"},
}
# Of every call.
_PARAMETERS = {"request-id": _REQUEST_ID, "traceparent": _TRACEPARENT}


def document(operations: Sequence[Operation[Any]]) -> bytes:
    """The document, as JSON.

    Args:
        operations: what it describes, besides metrics and probes.
    """
    kinds: list[Any] = [ErrorAnswer]
    for each in operations:
        whole, events = each.answers
        kinds += [*whole, *events, *filter(None, (each.body, each.options))]
    kinds = [kind for kind in kinds if kind not in (bytes, ByteStream)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    for each in operations:
        entry = paths.setdefault(_path(each), {})
        entry[each.verb.lower()] = _operation(each, schema_of, names)
    paths |= {path: {"get": entry} for path, entry in _probes().items()}
    found = {
        "openapi": "3.1.1",
        "info": {
            "title": "manyhats",
            "version": version("manyhats"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, *({name: []} for name in _SECURITY)],
        "paths": paths,
        "components": {
            "schemas": components,
            "parameters": _PARAMETERS,
            "headers": {name: _header(text) for name, text in (_HEADERS | _RETRY_HEADERS).items()},
            "securitySchemes": _SECURITY,
        },
    }
    return msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n"


def _path(operation: Operation[Any]) -> str:
    """The operation's path without the types that Starlette reads its parameters by."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", operation.path)


def _operation(operation: Operation[Any], schema_of: Mapping[Any, Any], names: set[str]) -> dict[str, Any]:
    path = _path(operation)
    name = (
        operation.method if operation.method not in names else f"{operation.method}{path.replace('/', '_')}"
    )
    names.add(name)
    parameters = [_parameter(each, "path") for each in re.findall(r"\{(\w+)\}", path)]
    parameters += [_parameter(each, "query", text) for each, text in operation.query.items()]
    parameters += [_parameter(each, "header", text) for each, text in operation.headers.items()]
    parameters += [{"$ref": f"#/components/parameters/{each}"} for each in _PARAMETERS]
    found: dict[str, Any] = {
        "operationId": name,
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {"200": _answer(operation, schema_of), **_errors(operation.all_errors)},
    }
    if operation.body is not None:
        is_form = operation.body is ByteStream
        content = _form(schema_of[operation.options]) if is_form else _json(schema_of[operation.body])
        found["requestBody"] = {"required": True, "content": content}
    return found


def _parameter(name: str, place: str, description: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "in": place, "schema": {"type": "string"}}
    if place == "path":
        found["required"] = True
    if description:
        found["description"] = description
    return found


def _answer(operation: Operation[Any], schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    whole, events = operation.answers
    content: dict[str, Any] = {}
    if bytes in whole:
        content["text/plain"] = {"schema": {"type": "string"}}
    elif whole:
        content |= _json(_any_of(schema_of[kind] for kind in whole))
    if events:
        content["text/event-stream"] = {"schema": _event([*(schema_of[kind] for kind in events)], schema_of)}
    return {"description": "The answer.", "headers": _refs(_HEADERS), "content": content}


def _event(schemas: list[Any], schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    """What each event of a stream is; the last is no JSON."""
    data = {
        "contentMediaType": "application/json",
        "contentSchema": _any_of([*schemas, schema_of[ErrorAnswer]]),
    }
    return {
        "description": "Each of the stream's events.",
        "type": "object",
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "anyOf": [data, {"const": "[DONE]"}]},
        },
        "required": ["data"],
    }


def _errors(words: Iterable[str]) -> dict[str, Any]:
    """An answer for each status that these reasons have."""
    codes: dict[int, set[str]] = {}
    for word in words:
        kind = KINDS[word]
        code = "the error's id" if word == "INTERNAL" else f"`{kind.code or word.lower()}`"
        codes.setdefault(kind.status, set()).add(code)
    found = {}
    for status in sorted(codes):
        answer: dict[str, Any] = {
            "description": f"`code` is {' or '.join(sorted(codes[status]))}.",
            "content": _json({"$ref": _REF.format(name=ErrorAnswer.__name__)}),
        }
        if status in (429, 503):
            answer["headers"] = _refs(_RETRY_HEADERS)
        found[str(status)] = answer
    return found


def _probes() -> dict[str, Any]:
    """The routes of ``probes.py``, which need no token."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    named = {"type": "object", "properties": {"version": {"type": "string"}}, "required": ["version"]}
    found = {
        "/metrics": _probe("Metrics", "The server's metrics, as Prometheus reads them.", text),
        "/version": _probe("Version", "The server's version.", _json(named)),
    }
    for path, ask in PROBES.items():
        name = path.removeprefix("/").replace("/", "_")
        if ask is is_ready:
            found[path] = _probe(name, "Whether a request would be served, and the server's state.", text)
            found[path]["responses"]["503"] = {"description": "It would not be served.", "content": text}
        elif ask is is_store_whole:
            found[path] = _probe(name, "Whether the store can be used, and for what it cannot.", text)
            found[path]["responses"]["503"] = {"description": "It is lost.", "content": text}
        else:
            found[path] = _probe(name, "Whether the process lives.", text)
    return found


def _probe(name: str, summary: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "security": [],
        "responses": {"200": {"description": "The answer.", "content": content}},
    }


def _any_of(schemas: Iterable[Any]) -> Any:
    found = list(schemas)
    return found[0] if len(found) == 1 else {"anyOf": found}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _form(options: Any) -> dict[str, Any]:
    files = {"type": "array", "items": {"type": "string", "contentMediaType": "application/octet-stream"}}
    schema = {
        "type": "object",
        "properties": {OPTIONS_FIELD: options, FILE_FIELD: files},
        "required": [FILE_FIELD],
    }
    return {"multipart/form-data": {"schema": schema}}


def _header(text: str) -> dict[str, Any]:
    return {"description": text, "schema": {"type": "string"}}


def _refs(headers: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
