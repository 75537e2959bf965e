"""Models by name: the base, and each task as a model of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from manyhats.adapters.reserved_labels import DEFAULT
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.call import HttpCall
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import active_records

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.server.service.backend import Backend


class Model(Struct, kw_only=True):
    """A task's version, or the base model, as a model of OpenAI's API."""

    id: str
    created: int
    root: str
    parent: str | None = None
    version: int | None = None
    method: str | None = None
    defaults: dict[str, str] = {}
    object: str = "model"
    owned_by: str = "manyhats"


class ModelList(Struct):
    """All that a caller may use."""

    data: list[Model]
    object: str = "list"


class Models:
    """Lists the base and the tasks of the backend behind the gate; ``created_s`` is when the base was loaded."""

    def __init__(self, gate: Gate, created_s: float) -> None:
        self._gate = gate
        self._created_s = created_s

    async def list(self, call: HttpCall, body: None) -> ModelList:
        """The base first, then each task's active version, as far as the caller's token reaches."""
        backend, scope = self._gate.backend, call.caller.scope
        base = [self._base(backend)] if scope.reaches("") else []
        return ModelList(base + [_task(record, backend) for record in active_records(backend.store, scope)])

    async def get(self, call: HttpCall, body: None) -> Model:
        """One of them, or a version by its name.

        Raises:
            AdapterError: there is none of that name.
        """
        backend = self._gate.backend
        name = task_name(backend, call.path["id"])
        call.names(name)
        if not name:
            return self._base(backend)
        return _task(backend.store.resolve(name), backend, name)

    def _base(self, backend: Backend) -> Model:
        name = backend.info.name
        return Model(id=name, created=int(self._created_s), root=name)


def _task(record: AdapterRecord, backend: Backend, name: str = "") -> Model:
    defaults = {
        key.removeprefix(DEFAULT): value for key, value in record.labels.items() if key.startswith(DEFAULT)
    }
    return Model(
        id=name or record.task_id,
        created=int(record.create_time.timestamp()),
        root=record.source or record.name,
        parent=backend.info.name,
        version=record.version,
        method=record.method.name.lower(),
        defaults=defaults,
    )


def task_name(backend: Backend, model: str | None, *aliases: str | None) -> str:
    """The task or version that a request's ``model`` names; "" for the base.

    Args:
        backend: knows the base's names.
        model: ``task``, ``task@3``, ``BASE:task``; a name of the base, "" or None for the base.
        aliases: other fields that may name the task where ``model`` names the base.

    Raises:
        FieldInvalidError: ``model`` and an alias name different tasks.
    """
    names = backend.info.names | {backend.info.name, ""}
    base, colon, task = (model or "").partition(":")
    name = task if colon and base in names else model or ""
    if name in names:
        name = ""
    for alias in filter(None, aliases):
        if name not in ("", alias):
            raise FieldInvalidError("model", f"names {name}, but another field names {alias}")
        name = alias
    return name


TASK_HEADER = "X-Task-Id"
"""Names the task of a request in one of TEI's forms, which have no field for it."""


def note_model(
    call: HttpCall,
    backend: Backend,
    model: str | None,
    request_id: str | None = None,
    *,
    reads_header: bool = False,
) -> str:
    """Note the id of a request, and the task or version that it names; the model's name in its answer.

    Args:
        call: the request's.
        backend: knows the base's names.
        model, request_id: its fields.
        reads_header: whether ``TASK_HEADER`` may name the task where ``model`` names the base.

    Raises:
        FieldInvalidError: the id cannot be one, or ``model`` and the header name different tasks.
        TaskNotAllowedError: the caller's scope does not cover the task.
    """
    call.renamed(request_id)
    headers = call.given.getlist(TASK_HEADER) if reads_header else ()
    name = task_name(backend, model, *(task_name(backend, each) for each in headers))
    call.names(name)
    return shown_name(backend, name) if headers else model or shown_name(backend, name)


def shown_name(backend: Backend, task: str) -> str:
    """The name of a task or version in answers; the base's for ""."""
    return task or backend.info.name
