"""What processes do to one catalogue at the same time; imported by each of them."""

from __future__ import annotations

import contextlib

from manyhats.adapters.errors import TaskNotFoundError
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.taskid import TaskName
from support.factories.catalogue_records import allow, register


def add_versions(url: str, worker: int, num_versions: int) -> list[str]:
    """Add versions of one task, each made of an artifact of its own; gives their names."""
    with contextlib.closing(Catalogue(url)) as catalogue:
        numbers = range(worker * num_versions, (worker + 1) * num_versions)
        return [register(catalogue, "fr", number).record.name for number in numbers]


def churn(url: str, worker: int, num_rounds: int) -> int:
    """Add, activate and remove versions of the same tasks; gives how many writes were made."""
    num_writes = 0
    with contextlib.closing(Catalogue(url)) as catalogue:
        for step in range(num_rounds):
            task = f"t{step % 2}"
            version = register(catalogue, task, step % 3, activate=False).record.version
            num_writes += 1
            with contextlib.suppress(TaskNotFoundError):
                catalogue.activate(task, version)
                num_writes += 1
            if (step + worker) % 3 == 0:
                with contextlib.suppress(TaskNotFoundError):
                    catalogue.remove(TaskName(task, version), allow)
                    num_writes += 1
            catalogue.refresh()
    return num_writes
