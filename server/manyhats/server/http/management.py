"""Managing tasks over HTTP: the methods of ``AdapterService`` and ``ServerService`` as routes, and vLLM's two."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import TaskNotFoundError
from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.adapter_messages import (
    AdapterAnswer,
    AdapterBody,
    AdapterList,
    DeleteAnswer,
    OptionsBody,
    RegisterAnswer,
    RegisterBody,
    ServerInfo,
    adapter_body,
    camel,
    server_info,
)
from manyhats.server.http.body import MAX_BODY_BYTES, ByteStream, query_of
from manyhats.server.http.call import HttpCall
from manyhats.server.http.multipart import MultipartUpload
from manyhats.server.http.operation import OF_A_REGISTRATION, OF_A_TASK, OF_AN_UPLOAD, Operation
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import Registrations, visible_page
from manyhats.server.service.uploads import take_upload

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics


class ListQuery(Struct, rename="camel", forbid_unknown_fields=True):
    """``ListAdaptersRequest``."""

    task_id: str = ""
    page_size: int = 0
    page_token: str = ""


class DeleteQuery(Struct, forbid_unknown_fields=True):
    """``DeleteAdapterRequest``, without the name."""

    force: bool = False


class CallerBody(Struct):
    """A token's entry in the token file, without the token; ``tasks`` is null if it covers everything."""

    name: str
    roles: list[str]
    tasks: tuple[str, ...] | None


class LoadBody(Struct, forbid_unknown_fields=True):
    """``POST /v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadBody(Struct, forbid_unknown_fields=True):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str
    lora_int_id: Any = None


class Management:
    """Manages the adapters of the backend behind the gate; lists show what the caller's scope covers."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def versions(self, call: HttpCall, body: None) -> AdapterList:
        """``GET /v1/tasks``: versions, page by page."""
        query = query_of(call.query, ListQuery)
        call.names(query.task_id)
        page = visible_page(
            self._gate.backend.store,
            call.caller.scope,
            task_id=query.task_id,
            page_size=query.page_size,
            page_token=query.page_token,
        )
        return AdapterList(self._bodies(page.records), page.next_page_token)

    async def register(self, call: HttpCall, body: RegisterBody) -> RegisterAnswer:
        """``POST /v1/tasks``: make an artifact, or several combined, a version of a task."""
        call.names(body.task_id or "")
        registrations = self._registrations
        with registrations.counted_failures():
            registration = body.registration
        answer = await registrations.register(registration)
        return RegisterAnswer(self._body(answer.record), answer.created)

    async def upload(self, call: HttpCall, body: ByteStream) -> RegisterAnswer:
        """``PUT /v1/tasks/{name}/upload``: make uploaded files a version of a task."""
        call.names(call.path["name"])
        answer = await take_upload(MultipartUpload(call.path["name"], body), self._registrations, _nothing)
        return RegisterAnswer(self._body(answer.record), answer.created)

    async def get(self, call: HttpCall, body: None) -> AdapterAnswer:
        """``GET /v1/tasks/{name}``: one version."""
        call.names(call.path["name"])
        return AdapterAnswer(self._body(self._gate.backend.store.get(call.path["name"])))

    async def activate(self, call: HttpCall, body: None) -> AdapterAnswer:
        """``POST /v1/tasks/{name}/activate``: move a task to one of its versions."""
        call.names(call.path["name"])
        return AdapterAnswer(self._body(await self._registrations.activate(call.path["name"])))

    async def pin(self, call: HttpCall, body: None) -> AdapterAnswer:
        """``POST /v1/tasks/{name}/pin``: keep a version in memory."""
        call.names(call.path["name"])
        return AdapterAnswer(self._body(await self._registrations.pin(call.path["name"])))

    async def unpin(self, call: HttpCall, body: None) -> AdapterAnswer:
        """``POST /v1/tasks/{name}/unpin``: let a version leave memory again."""
        call.names(call.path["name"])
        return AdapterAnswer(self._body(await self._registrations.unpin(call.path["name"])))

    async def delete(self, call: HttpCall, body: None) -> DeleteAnswer:
        """``DELETE /v1/tasks/{name}``: delete one version or a whole task."""
        call.names(call.path["name"])
        force = query_of(call.query, DeleteQuery).force
        return DeleteAnswer(self._bodies(await self._registrations.delete(call.path["name"], force=force)))

    async def info(self, call: HttpCall, body: None) -> ServerInfo:
        """``GET /v1/server``: the server and the base model."""
        call.names(None)
        return server_info(self._gate.backend, version("manyhats"), MAX_BODY_BYTES)

    async def caller(self, call: HttpCall, body: None) -> CallerBody:
        """``GET /v1/caller``: whose token it is, and what it allows."""
        call.names(None)
        caller = call.caller
        return CallerBody(caller.name, sorted(role.value for role in caller.roles), caller.scope.globs)

    async def load(self, call: HttpCall, body: LoadBody) -> bytes:
        """``POST /v1/load_lora_adapter``, as vLLM has it: a name that exists is refused unless asked for.

        Raises:
            FieldInvalidError: the task exists.
        """
        call.names(body.lora_name)
        registrations = self._registrations
        with registrations.counted_failures():
            if not body.load_inplace and self._exists(body.lora_name):
                raise FieldInvalidError(
                    "task_id", f"{body.lora_name} exists; load_inplace makes a new version of it"
                )
            registration = Registration(body.lora_name, Uri(body.lora_path))
        record = (await registrations.register(registration)).record
        return _text(call, f"success: {record.name} is served as {record.task_id}")

    async def unload(self, call: HttpCall, body: UnloadBody) -> bytes:
        """``POST /v1/unload_lora_adapter``: delete a task; requests running on it finish."""
        call.names(body.lora_name)
        gone = await self._registrations.delete(body.lora_name, force=True)
        return _text(call, "success: deleted " + ", ".join(record.name for record in gone))

    def _exists(self, task_id: str) -> bool:
        try:
            return bool(self._gate.backend.store.versions(task_id))
        except TaskNotFoundError:
            return False

    @property
    def _registrations(self) -> Registrations:
        return Registrations(self._gate.backend, self._metrics)

    def _body(self, record: AdapterRecord) -> AdapterBody:
        return adapter_body(record, self._gate.backend.engine.adapter_tiers())

    def _bodies(self, records: Iterable[AdapterRecord]) -> list[AdapterBody]:
        tiers = self._gate.backend.engine.adapter_tiers()
        return [adapter_body(record, tiers) for record in records]


async def _nothing() -> None:
    """HTTP says by itself that it takes a body (``Expect: 100-continue``)."""


def _text(call: HttpCall, text: str) -> bytes:
    call.headers["content-type"] = "text/plain; charset=utf-8"
    return f"{text}\n".encode()


def _lora_name(field: str) -> str:
    """vLLM's name of a field."""
    return {"task_id": "lora_name", "uri": "lora_path"}.get(field, field)


def operations(gate: Gate, metrics: Metrics) -> list[Operation[Any]]:
    """The calls."""
    management = Management(gate, metrics)
    call = partial(Operation, name_of=camel)
    return [
        call(
            verb="GET",
            path="/v1/tasks",
            method="ListAdapters",
            handle=management.versions,
            summary="List the versions of tasks, page by page.",
            query={
                "taskId": "Only this task's versions.",
                "pageSize": "At most so many in a page; 100 without it, and never more than 1000.",
                "pageToken": "`nextPageToken` of the page before.",
            },
            errors=frozenset({"TASK_NOT_ALLOWED"}),
        ),
        call(
            verb="POST",
            path="/v1/tasks",
            method="RegisterAdapter",
            handle=management.register,
            body=RegisterBody,
            summary="Make an adapter that the server can read a version of a task.",
            errors=OF_A_REGISTRATION,
        ),
        call(
            verb="GET",
            path="/v1/tasks/{name}",
            method="GetAdapter",
            handle=management.get,
            summary="Show a task's active version, or the one named as in `task@3`.",
            errors=OF_A_TASK,
        ),
        call(
            verb="DELETE",
            path="/v1/tasks/{name}",
            method="DeleteAdapter",
            handle=management.delete,
            summary="Delete one version, or a task with all its versions.",
            query={"force": "`true` deletes versions that requests are running on; those finish."},
            errors=OF_A_TASK | {"ADAPTER_IN_USE"},
        ),
        call(
            verb="POST",
            path="/v1/tasks/{name}/activate",
            method="ActivateAdapter",
            handle=management.activate,
            summary="Move a task to one of its versions.",
            errors=OF_A_TASK | {"DATA_LOSS"},
        ),
        call(
            verb="POST",
            path="/v1/tasks/{name}/pin",
            method="PinAdapter",
            handle=management.pin,
            summary="Keep a version in memory: the one named as in `task@3`, or whichever is active, now and later.",
            errors=OF_A_TASK | {"DATA_LOSS", "QUOTA_EXCEEDED"},
        ),
        call(
            verb="POST",
            path="/v1/tasks/{name}/unpin",
            method="UnpinAdapter",
            handle=management.unpin,
            summary="Let a version leave memory again, or all that is pinned of a task.",
            errors=OF_A_TASK,
        ),
        call(
            verb="PUT",
            path="/v1/tasks/{name}/upload",
            method="UploadAdapter",
            handle=management.upload,
            body=ByteStream,
            options=OptionsBody,
            summary="Make uploaded files a version of a task.",
            errors=OF_AN_UPLOAD,
        ),
        call(
            verb="GET",
            path="/v1/server",
            method="GetServerInfo",
            handle=management.info,
            summary="Show the server, its base model and its limits.",
        ),
        call(
            verb="GET",
            path="/v1/caller",
            method="GetCaller",
            handle=management.caller,
            summary="Show what the token that asks allows.",
        ),
        call(
            verb="POST",
            path="/v1/load_lora_adapter",
            method="RegisterAdapter",
            handle=management.load,
            body=LoadBody,
            name_of=_lora_name,
            summary="Register a task, as vLLM loads an adapter.",
            errors=OF_A_REGISTRATION,
        ),
        call(
            verb="POST",
            path="/v1/unload_lora_adapter",
            method="DeleteAdapter",
            handle=management.unload,
            body=UnloadBody,
            name_of=_lora_name,
            summary="Delete a task, as vLLM unloads an adapter.",
            errors=OF_A_TASK,
        ),
    ]
