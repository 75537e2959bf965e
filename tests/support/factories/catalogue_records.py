"""Records and registrations for tests of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Registered, Registration, Uri
from manyhats.adapters.store.catalogue.catalogue import Catalogue


def digest_of(number: int) -> str:
    """A digest of its own for each number."""
    return f"sha256:{number:064x}"


def make_record(task_id: str, number: int = 0, **changes: Any) -> AdapterRecord:
    """A plain version made of artifact ``number``, as it is before the catalogue has it."""
    record = AdapterRecord(
        task_id=task_id,
        version=0,
        digest=digest_of(number),
        method=AdapterMethod.LORA,
        state=AdapterState.CREATING,
        parts=(ArtifactPart(digest_of(number), 1.0, "a"),),
        size_bytes=100,
        num_parameters=25,
        source="a",
        create_time=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    )
    return replace(record, **changes)


def register(
    catalogue: Catalogue, task_id: str, number: int = 0, *, quotas: Quotas | None = None, **asked: Any
) -> Registered:
    """Add artifact ``number`` to a task, with whatever else is asked."""
    return catalogue.add(
        make_record(task_id, number), Registration(task_id, Uri("a"), **asked), quotas or Quotas()
    )


def allow(_: object) -> None:
    """A check of a removal that keeps nothing."""


def refuse_with(error: Exception) -> Callable[[object], None]:
    """One that keeps everything."""

    def check(_: object) -> None:
        raise error

    return check


def names(catalogue: Catalogue) -> list[str]:
    """All versions, in the order of the list."""
    return [record.name for record in catalogue.page(task_id="", after=("", 0), max_records=1000)]
