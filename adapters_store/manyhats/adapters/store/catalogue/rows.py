"""Tasks, and the answers to registrations by request id, as rows of the catalogue's tables; records as documents."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, delete, insert, select, update

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.errors import RequestIdReusedError
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.registration import Registered, Registration
from manyhats.adapters.store.catalogue.database import WriteTransaction
from manyhats.adapters.store.catalogue.tables import (
    ANSWERS,
    ARTIFACTS,
    CATALOGUE,
    PINS,
    TASKS,
    VERSIONS,
)
from manyhats.adapters.store.catalogue.task import CataloguedTask, version_state

# How many values one statement uses; databases have limits.
_MAX_VALUES = 1000

MAX_REMEMBERED = 10_000


def read_generation(connection: Connection) -> int:
    """Counts the catalogue's writes."""
    return int(connection.execute(select(CATALOGUE.c.generation)).scalar_one())


def read_task(connection: Connection, task_id: str) -> CataloguedTask:
    """One task; without versions if it never existed."""
    return next(iter(_read_tasks(connection, TASKS.c.task_id == task_id)), CataloguedTask(task_id=task_id))


def read_changed_tasks(connection: Connection, since: int) -> list[CataloguedTask]:
    """The tasks that writes after generation ``since`` changed; 0: all tasks."""
    return _read_tasks(connection, TASKS.c.generation > since)


def read_named_digests(connection: Connection, digests: Collection[str]) -> frozenset[str]:
    """Those digests whose artifact is part of some version."""
    asked = sorted(digests)
    named: set[str] = set()
    for start in range(0, len(asked), _MAX_VALUES):
        some = asked[start : start + _MAX_VALUES]
        named.update(connection.scalars(select(ARTIFACTS.c.digest).where(ARTIFACTS.c.digest.in_(some))))
    return frozenset(named)


def write_task(
    transaction: WriteTransaction, before: CataloguedTask, after: CataloguedTask
) -> CataloguedTask:
    """Write what differs between two states of a task; returns the second, with the transaction's generation."""
    after = replace(after, generation=transaction.generation)
    connection = transaction.connection
    _write_head(connection, after, is_new=not before.generation)
    _delete_versions(connection, before.task_id, before.versions.keys() - after.versions)
    _insert_versions(
        connection, [after.versions[number] for number in after.versions.keys() - before.versions]
    )
    for number in before.versions.keys() & after.versions:
        old, new = before.versions[number], after.versions[number]
        if (old.state_reason, old.registered_for) != (new.state_reason, new.registered_for):
            _write_change(connection, new)
    _write_pins(connection, after.task_id, before.pins, after.pins)
    return after


def _read_tasks(connection: Connection, condition: ColumnElement[bool]) -> list[CataloguedTask]:
    heads = connection.execute(select(TASKS).where(condition).order_by(TASKS.c.task_id)).all()
    query = select(VERSIONS).join(TASKS).where(condition).order_by(VERSIONS.c.task_id, VERSIONS.c.version)
    rows: dict[str, list[Row[Any]]] = {head.task_id: [] for head in heads}
    for row in connection.execute(query):
        rows[row.task_id].append(row)
    pins: dict[str, set[int]] = {head.task_id: set() for head in heads}
    for pin in connection.execute(select(PINS).join(TASKS).where(condition)):
        pins[pin.task_id].add(pin.version)
    return [
        CataloguedTask(
            task_id=head.task_id,
            generation=head.generation,
            last_version=head.last_version,
            active_version=head.active_version,
            versions=MappingProxyType(
                {row.version: _read_version(row, head.active_version) for row in rows[head.task_id]}
            ),
            pins=frozenset(pins[head.task_id]),
        ).with_states()
        for head in heads
    ]


def _read_version(row: Row[Any], active_version: int | None) -> AdapterRecord:
    return read_details(
        row.details,
        task_id=row.task_id,
        version=row.version,
        digest=row.digest,
        size_bytes=row.size_bytes,
        state=version_state(row.version, active_version, row.failure),
        state_reason=row.failure,
    )


def _write_head(connection: Connection, task: CataloguedTask, *, is_new: bool) -> None:
    values = {
        "last_version": task.last_version,
        "active_version": task.active_version,
        "generation": task.generation,
    }
    if is_new:
        connection.execute(insert(TASKS).values(task_id=task.task_id, **values))
    else:
        connection.execute(update(TASKS).where(TASKS.c.task_id == task.task_id).values(**values))


def _insert_versions(connection: Connection, records: Iterable[AdapterRecord]) -> None:
    for record in records:
        name = {"task_id": record.task_id, "version": record.version}
        row = {"digest": record.digest, "size_bytes": record.size_bytes, "failure": record.state_reason}
        connection.execute(insert(VERSIONS).values(**name, **row, details=details_document(record)))
        artifacts = {part.digest for part in record.parts}
        connection.execute(insert(ARTIFACTS), [name | {"digest": digest} for digest in artifacts])


def _delete_versions(connection: Connection, task_id: str, versions: Collection[int]) -> None:
    if versions:
        one = delete(VERSIONS).where(VERSIONS.c.task_id == task_id, VERSIONS.c.version == bindparam("gone"))
        connection.execute(one, [{"gone": version} for version in versions])


def _write_change(connection: Connection, record: AdapterRecord) -> None:
    """The parts of a version that may change, as written."""
    is_it = (VERSIONS.c.task_id == record.task_id) & (VERSIONS.c.version == record.version)
    connection.execute(
        update(VERSIONS).where(is_it).values(failure=record.state_reason, details=details_document(record))
    )


def _write_pins(
    connection: Connection, task_id: str, before: Collection[int], after: Collection[int]
) -> None:
    for version in set(before) - set(after):
        connection.execute(delete(PINS).where(PINS.c.task_id == task_id, PINS.c.version == version))
    for version in set(after) - set(before):
        connection.execute(insert(PINS).values(task_id=task_id, version=version))


def read_answer(connection: Connection, registration: Registration) -> Registered | None:
    """The answer given to its request id; None if the id is new.

    Raises:
        RequestIdReusedError: it was used for something else.
    """
    row = connection.execute(
        select(ANSWERS).where(ANSWERS.c.request_id == registration.request_id)
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint != registration.fingerprint():
        raise RequestIdReusedError("request_id", "was used before, for a registration with other content")
    return Registered(read_record(row.record), row.created)


def write_answer(transaction: WriteTransaction, registration: Registration, answer: Registered) -> None:
    """Keep the answer to a new request id; beyond ``MAX_REMEMBERED``, the oldest are dropped."""
    if not registration.request_id:
        return
    row = {
        "request_id": registration.request_id,
        "fingerprint": registration.fingerprint(),
        "created": answer.created,
        "record": record_document(answer.record),
        "generation": transaction.generation,
    }
    transaction.connection.execute(insert(ANSWERS), row)
    latest = select(ANSWERS.c.generation).order_by(ANSWERS.c.generation.desc())
    transaction.connection.execute(
        delete(ANSWERS).where(
            ANSWERS.c.generation <= latest.offset(MAX_REMEMBERED).limit(1).scalar_subquery()
        )
    )


def details_document(record: AdapterRecord) -> dict[str, Any]:
    """A version's details: everything but its names, size and state."""
    return {
        "method": record.method.value,
        "parts": [
            [part.digest, part.weight, part.source, *([list(part.text_files)] if part.text_files else [])]
            for part in record.parts
        ],
        "num_parameters": record.num_parameters,
        "source": record.source,
        "create_time": record.create_time.isoformat(),
        "base_model": record.base_model,
        "registered_for": list(record.registered_for),
        "labels": dict(record.labels),
        "effect": record.effect,
        "notes": list(record.notes),
        **({} if record.kind is TaskKind.GENERATE else {"kind": record.kind.value}),
        **({"num_classes": record.num_classes} if record.num_classes else {}),
        **({} if record.pooling is None else {"pooling": record.pooling.value}),
        **({"text": record.text} if record.text else {}),
    }


def record_document(record: AdapterRecord) -> dict[str, Any]:
    """A complete record."""
    return details_document(record) | {
        "task_id": record.task_id,
        "version": record.version,
        "digest": record.digest,
        "size_bytes": record.size_bytes,
        "state": record.state.value,
        "state_reason": record.state_reason,
        **({"is_pinned": True} if record.is_pinned else {}),
    }


def read_details(
    details: Mapping[str, Any],
    *,
    task_id: str,
    version: int,
    digest: str,
    size_bytes: int,
    state: AdapterState,
    state_reason: str,
) -> AdapterRecord:
    """The record from a ``details_document`` and what it leaves out."""
    return AdapterRecord(
        task_id=task_id,
        version=version,
        digest=digest,
        method=AdapterMethod(details["method"]),
        state=state,
        parts=tuple(_part(*part) for part in details["parts"]),
        size_bytes=size_bytes,
        num_parameters=details["num_parameters"],
        source=details["source"],
        create_time=datetime.fromisoformat(details["create_time"]),
        base_model=details["base_model"],
        registered_for=tuple(details.get("registered_for", ())),
        state_reason=state_reason,
        labels=MappingProxyType(details["labels"]),
        effect=details["effect"],
        notes=tuple(details["notes"]),
        kind=TaskKind(details.get("kind", TaskKind.GENERATE.value)),
        num_classes=details.get("num_classes", 0),
        pooling=Pooling(details["pooling"]) if "pooling" in details else None,
        text=details.get("text", ""),
    )


def _part(digest: str, weight: float, source: str, text_files: Sequence[str] = ()) -> ArtifactPart:
    return ArtifactPart(digest, weight, source, tuple(text_files))


def read_record(document: Mapping[str, Any]) -> AdapterRecord:
    """The record from a ``record_document``."""
    record = read_details(
        document,
        task_id=document["task_id"],
        version=document["version"],
        digest=document["digest"],
        size_bytes=document["size_bytes"],
        state=AdapterState(document["state"]),
        state_reason=document["state_reason"],
    )
    return replace(record, is_pinned=document.get("is_pinned", False))
