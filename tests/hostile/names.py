"""Task ids and versions that are none, in every call that takes one."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from hostile.case import Case, World, register
from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2

TASK_IDS = {
    "empty": "",
    "upper case": "Good",
    "64 characters": "a" * 64,
    "a megabyte": "a" * 2**20,
    "dot": ".",
    "dots": "..",
    "up": "../good",
    "slash": "a/b",
    "absolute": "/etc/passwd",
    "backslash": "a\\b",
    "encoded slash": "a%2fb",
    "comma": "a,b",
    "space": "a b",
    "NUL": "good\0",
    "NUL inside": "a\0b",
    "line feed": "good\n",
    "line feed first": "\ngood",
    "accent": "é",
    "full-width": "\uff47ood",
    "other digits": "a٣",
    "right-to-left": "a\u202eb",
    "zero width": "a\u200bb",
    "byte order mark": "\ufeffgood",
    "dash first": "-a",
    "dot last": "a.",
    "colon": "a:b",
    "base label": "_base",
    "sql": "a'; drop table versions; --",
    "glob": "*",
}
VERSIONS = {
    "version": "good@1",
    "version 0": "good@0",
    "negative version": "good@-1",
    "padded version": "good@01",
    "two versions": "good@1@2",
    "word for a version": "good@x",
    "empty version": "good@",
    "no task": "@1",
    "other digits for a version": "good@٣",
    "ten digits": "good@9999999999",
    "version and line feed": "good@1\n",
    "version and NUL": "good@1\0",
    "float version": "good@1.0",
}


def _case(what: str, name: str, make: Callable[[str], Message]) -> Case:
    return Case(f"{what} {name}", TaskIdInvalidError, "task_id", lambda world: make(_NAMES[name]))


def _registered(name: str) -> Case:
    def call(world: World) -> Message:
        return register(world, uri="good", task_id=_NAMES[name])

    return Case(f"register task id: {name}", TaskIdInvalidError, "task_id", call)


def _generate(task_id: str) -> Message:
    return generation_pb2.GenerateRequest(task_id=task_id, text="a")


_NAMES = TASK_IDS | VERSIONS
_TAKEN = [name for name in _NAMES if name not in ("version", "empty")]
CASES = [
    *(_registered(name) for name in _NAMES),
    *(_case("get", name, lambda text: pb.GetAdapterRequest(task_id=text)) for name in [*_TAKEN, "empty"]),
    *(_case("delete", name, lambda text: pb.DeleteAdapterRequest(task_id=text)) for name in _TAKEN),
    *(_case("activate", name, lambda text: pb.ActivateAdapterRequest(task_id=text)) for name in _TAKEN),
    *(_case("pin", name, lambda text: pb.PinAdapterRequest(task_id=text)) for name in _TAKEN),
    *(_case("generate for", name, _generate) for name in _TAKEN),
    *(
        _case("list", name, lambda text: pb.ListAdaptersRequest(task_id=text))
        for name in _NAMES
        if name != "empty"
    ),
]
