"""Calls that are well-formed, and out of place: what does not exist, is in use, was said before, or is forged."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from hostile.case import Call, Case, World, register
from manyhats.adapters.errors import (
    AdapterInUseError,
    ArgumentInvalidError,
    DigestMismatchError,
    NoActiveVersionError,
    RequestIdReusedError,
    TaskNotFoundError,
)
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.catalogue.pages import encode_page_token
from manyhats.engine.errors import DrainingError
from manyhats.server.service.errors import LoadingError
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2

ZERO_DIGEST = "sha256:" + "0" * 64


def _good(**fields: Any) -> Callable[[World], Call]:
    return lambda world: register(world, uri="good", **fields)


def _reused(**changed: Any) -> Callable[[World], Call]:
    """A request id that was used for the task ``good``, now with something changed."""

    def call(world: World) -> Call:
        request_id = f"id-{world.source.name}"
        world.store.register(Registration("good", Uri("good"), request_id=request_id))
        given = {"task_id": "good", "uri": "good", "request_id": request_id}
        return register(world, **(given | changed))

    return call


def _inactive(make: Callable[[str], Call]) -> Callable[[World], Call]:
    """A call that names a task without an active version."""

    def call(world: World) -> Call:
        task_id = f"idle-{world.source.name}"
        world.store.register(Registration(task_id, Uri("good"), activate=False))
        return make(task_id)

    return call


def _get(name: str) -> Call:
    return pb.GetAdapterRequest(task_id=name)


def _generate(name: str) -> Call:
    return generation_pb2.GenerateRequest(task_id=name, text="a")


def _delete(name: str, **fields: Any) -> Call:
    return pb.DeleteAdapterRequest(task_id=name, **fields)


def _activate(name: str) -> Call:
    return pb.ActivateAdapterRequest(task_id=name)


def _encoded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


PAGE_TOKENS = {
    "a word": "token",
    "not ASCII": "é" * 8,
    "NUL": "\0",
    "a path": "../../etc/passwd",
    "10000 characters": "A" * 10_000,
    "base64 of nothing": "====",
    "base64 of bytes": base64.urlsafe_b64encode(b"\xff\xfe\xfd").decode(),
    "base64 of deep JSON": base64.urlsafe_b64encode(b"[" * 300).decode(),
    "an object": _encoded({"task_id": "a"}),
    "a number": _encoded(1),
    "two fields": _encoded(["", "a"]),
    "four fields": _encoded(["", "a", 1, 1]),
    "a filter of numbers": _encoded([1, "a", 1]),
    "a task of numbers": _encoded(["", 1, 1]),
    "no task": _encoded(["", None, 1]),
    "a version of text": _encoded(["", "a", "1"]),
    "a version of truth": _encoded(["", "a", True]),
    "a fractional version": _encoded(["", "a", 1.5]),
    "a negative version": _encoded(["", "a", -1]),
    "a vast version": _encoded(["", "a", 10**30]),
    "NaN": base64.urlsafe_b64encode(b'["", "a", NaN]').decode(),
    "a task id that is none": _encoded(["", "../a", 1]),
    "a task id of half a surrogate": _encoded(["", "\ud800", 1]),
    "another list's": encode_page_token("other", "other", 1),
}

CASES = [
    *(
        Case(
            f"page token {name}",
            ArgumentInvalidError,
            "page_token",
            lambda world, token=token: pb.ListAdaptersRequest(page_token=token),
        )
        for name, token in PAGE_TOKENS.items()
    ),
    *(
        Case(f"{verb} {what}", TaskNotFoundError, name, lambda world, make=make, name=name: make(name))
        for verb, make in {"get": _get, "generate for": _generate, "delete": _delete}.items()
        for what, name in {"an unknown task": "nobody", "an unknown version": "good@99"}.items()
    ),
    Case("activate an unknown task", TaskNotFoundError, "nobody", lambda world: _activate("nobody@1")),
    Case("activate an unknown version", TaskNotFoundError, "good@99", lambda world: _activate("good@99")),
    Case("activate no version", ArgumentInvalidError, "task_id", lambda world: _activate("good")),
    Case("get no active version", NoActiveVersionError, "idle", _inactive(_get)),
    Case("generate without an active version", NoActiveVersionError, "idle", _inactive(_generate)),
    Case("delete a task in use", AdapterInUseError, "good@1", lambda world: _delete("good"), in_use=True),
    Case(
        "delete a version in use", AdapterInUseError, "good@1", lambda world: _delete("good@1"), in_use=True
    ),
    *(
        Case(f"digest {name}", DigestMismatchError, "expected_digest", _good(expected_digest=digest))
        for name, digest in {
            "of something else": ZERO_DIGEST,
            "without its algorithm": "0" * 64,
            "of another algorithm": "md5:" + "0" * 32,
            "a word": "latest",
            "with a path": "../../etc",
            "with NUL": "sha256:\0",
        }.items()
    ),
    *(
        Case(f"request id reused for {name}", RequestIdReusedError, "request_id", _reused(**changed))
        for name, changed in {
            "another task": {"task_id": "task"},
            "another source": {"uri": "./good"},
            "another way": {"activate": False},
            "other labels": {"labels": {"a": "b"}},
            "a check": {"validate_only": True},
        }.items()
    ),
    *(
        Case(f"request id {name}", ArgumentInvalidError, "request_id", _good(request_id=text))
        for name, text in {"long": "x" * 129, "with NUL": "a\0", "with a line feed": "a\nb"}.items()
    ),
    *(
        Case(f"labels {name}", ArgumentInvalidError, "labels", _good(labels=labels))
        for name, labels in {
            "without a key": {"": "x"},
            "with a long key": {"x" * 300: ""},
            "with a long value": {"x": "x" * 300},
            "with a line feed": {"a\n": "x"},
            "with NUL": {"a": "\0"},
            "with a right-to-left mark": {"a": "\u202e"},
            "in great number": {str(n): "x" for n in range(65)},
        }.items()
    ),
    *(
        Case(f"{verb} while {state}", error, "", make, gate=state)
        for verb, make in {
            "register": _good(),
            "upload": lambda world: [pb.UploadAdapterRequest(header=pb.UploadHeader(task_id="task"))],
            "get": lambda world: _get("good"),
            "generate": lambda world: _generate("good"),
            "delete": lambda world: _delete("good", force=True),
        }.items()
        for state, error in (("draining", DrainingError), ("loading", LoadingError))
    ),
]
