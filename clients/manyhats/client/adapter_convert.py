"""Requests and responses of the calls that manage adapters. Pure; both clients use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Any, TypeAlias
from uuid import uuid4

from manyhats.client.fields import assign, enum_name, invalid
from manyhats.client.requests import RegisterOptions
from manyhats.client.results import AdapterInfo, ArtifactPart, Registration
from manyhats.v1 import adapter_pb2

_RegistrationRequest: TypeAlias = adapter_pb2.RegisterAdapterRequest | adapter_pb2.UploadHeader


def register_request(
    task_id: str, uri: str, parts: Iterable[tuple[str, float]], options: Mapping[str, object]
) -> adapter_pb2.RegisterAdapterRequest:
    """The request of ``register_adapter``.

    Raises:
        InvalidRequestError: a value does not fit its field.
        TypeError: there is no option of that name.
    """
    request = adapter_pb2.RegisterAdapterRequest(task_id=task_id, uri=uri)
    for index, part in enumerate(parts):
        _add_part(request, part, f"parts[{index}]")
    _set_options(request, options, "register_adapter")
    return request


def upload_header(
    task_id: str, files: Iterable[adapter_pb2.FileInfo], options: Mapping[str, object]
) -> adapter_pb2.UploadHeader:
    """The header of ``upload_adapter``; raises as ``register_request`` does."""
    header = adapter_pb2.UploadHeader(task_id=task_id, files=files)
    _set_options(header, options, "upload_adapter")
    return header


def list_request(task_id: str, page_size: int) -> adapter_pb2.ListAdaptersRequest:
    """The request of the first page of ``list_adapters``."""
    request = adapter_pb2.ListAdaptersRequest(task_id=task_id)
    assign(request, "page_size", page_size, "page_size")
    return request


def registration(
    response: adapter_pb2.RegisterAdapterResponse | adapter_pb2.UploadAdapterResponse,
) -> Registration:
    """The result of registering or uploading."""
    return Registration(adapter=adapter_info(response.adapter), created=response.created)


def adapter_info(adapter: adapter_pb2.Adapter) -> AdapterInfo:
    """One adapter version."""
    return AdapterInfo(
        task_id=adapter.task_id,
        version=adapter.version,
        digest=adapter.digest,
        method=enum_name(adapter_pb2.AdapterMethod.Name, adapter.method, "ADAPTER_METHOD_"),
        state=enum_name(adapter_pb2.AdapterState.Name, adapter.state, "ADAPTER_STATE_"),
        state_reason=adapter.state_reason,
        size_bytes=adapter.size_bytes,
        num_parameters=adapter.num_parameters,
        source=adapter.source,
        create_time=adapter.create_time.ToDatetime(UTC) if adapter.HasField("create_time") else None,
        base_model=adapter.base_model,
        labels=dict(adapter.labels),
        effect=adapter.effect if adapter.HasField("effect") else None,
        residency=enum_name(adapter_pb2.AdapterResidency.Name, adapter.residency, "ADAPTER_RESIDENCY_"),
        notes=tuple(adapter.notes),
        parts=tuple(
            ArtifactPart(
                digest=part.digest,
                weight=part.weight,
                source=part.source,
                text_files=tuple(part.text_files),
            )
            for part in adapter.parts
        ),
        kind=enum_name(adapter_pb2.TaskKind.Name, adapter.kind, "TASK_KIND_"),
        class_labels=tuple(adapter.class_labels),
        pooling=enum_name(adapter_pb2.Pooling.Name, adapter.pooling, "POOLING_"),
        pinned=adapter.pinned,
    )


def _add_part(request: adapter_pb2.RegisterAdapterRequest, part: Any, path: str) -> None:
    if isinstance(part, str) or len(part) != 2:
        raise invalid(path, "must be a pair of uri and weight")
    added = request.parts.add()
    for name, value in zip(("uri", "weight"), part, strict=True):
        assign(added, name, value, f"{path}.{name}")


def _set_options(request: _RegistrationRequest, options: Mapping[str, object], method: str) -> None:
    for name, value in options.items():
        if name not in RegisterOptions.__annotations__:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        if value is not None:
            assign(request, name, value, name)
    if not (request.request_id or request.validate_only):
        # So that it can be tried again: whatever became of the first try, the answer is the same.
        request.request_id = uuid4().hex
