"""Records as JSON documents, as stored in the catalogue's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart


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
        text=details.get("text", ""),
    )


def _part(digest: str, weight: float, source: str, text_files: Sequence[str] = ()) -> ArtifactPart:
    return ArtifactPart(digest, weight, source, tuple(text_files))


def read_record(document: Mapping[str, Any]) -> AdapterRecord:
    """The record from a ``record_document``."""
    return read_details(
        document,
        task_id=document["task_id"],
        version=document["version"],
        digest=document["digest"],
        size_bytes=document["size_bytes"],
        state=AdapterState(document["state"]),
        state_reason=document["state_reason"],
    )
