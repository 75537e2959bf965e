"""Whether one more version fits the quotas, according to the database."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, distinct, func, select

from manyhats.adapters.errors import QuotaExceededError
from manyhats.adapters.quotas import Quotas
from manyhats.adapters.store.catalogue.tables import VERSIONS
from manyhats.adapters.store.catalogue.task import CataloguedTask


def check_quotas(connection: Connection, task: CataloguedTask, size_bytes: int, quotas: Quotas) -> None:
    """Accept one more version of a task.

    Args:
        connection: in a transaction that no other writer interferes with.
        task: its current state.
        size_bytes: the size of the version to add.
        quotas: must still hold afterwards.

    Raises:
        QuotaExceededError: a quota would be exceeded; ``subject`` is the first one.
    """
    for name, limit, would_be in _needs(connection, task, size_bytes, quotas):
        if would_be > limit:
            raise QuotaExceededError(name, f"one more version would make it {would_be}; the limit is {limit}")


def _needs(
    connection: Connection, task: CataloguedTask, size_bytes: int, quotas: Quotas
) -> Iterator[tuple[str, int, int]]:
    """Name, limit and the new value, for each quota that is set."""
    if quotas.max_tasks is not None and not task.versions:
        num_tasks = connection.execute(select(func.count(distinct(VERSIONS.c.task_id)))).scalar_one()
        yield "max_tasks", quotas.max_tasks, num_tasks + 1
    if quotas.max_versions_per_task is not None:
        yield "max_versions_per_task", quotas.max_versions_per_task, len(task.versions) + 1
    if quotas.max_bytes_per_task is not None:
        held = sum(record.size_bytes for record in task.versions.values())
        yield "max_bytes_per_task", quotas.max_bytes_per_task, held + size_bytes
    if quotas.max_bytes is not None:
        held = connection.execute(select(func.coalesce(func.sum(VERSIONS.c.size_bytes), 0))).scalar_one()
        yield "max_bytes", quotas.max_bytes, int(held) + size_bytes
