"""A store of very many tasks: filling one, and a client's look-ups in it."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.measure import Measurement
from benchmarks.workload import Workload
from manyhats.client import Client

_PAGE_SIZE = 100


def task_name(index: int) -> str:
    """Of one of many tasks."""
    return f"task{index:05}"


def fill_store(store: Path, num_tasks: int) -> None:
    """Give a store's one task, ``task_name(0)``, the company of others that are made of the same artifact."""
    # Imported where it is used: the client's processes have no need of it, nor of torch.
    from manyhats.adapters.limits import Quotas
    from manyhats.adapters.registration import Registration, Uri
    from manyhats.adapters.store.catalogue.catalogue import Catalogue

    catalogue = Catalogue(f"sqlite:///{store / 'catalogue.db'}")
    (first,) = catalogue.versions(task_name(0))
    for index in range(1, num_tasks):
        record = replace(first, task_id=task_name(index))
        catalogue.add(record, Registration(record.task_id, Uri(record.source)), Quotas())
    catalogue.close()


class LookupSession:
    """Lives in a worker process; imports nothing of the engine."""

    def __init__(self, workload: Workload, target: str) -> None:
        self._settings = workload.settings
        self._client = Client(target)

    def register(self, path: Path) -> None:
        """Makes an adapter the first of the tasks."""
        self._client.register_adapter(task_name(0), str(path))

    def measure(self) -> Measurement:
        """Whole calls, as a caller waits for them: for one task, and for a page of the list of all."""
        source = random.Random(0)
        self._client.server_info()  # connects
        lookup_s = []
        for _ in range(self._settings.lookups):
            name = task_name(source.randrange(self._settings.num_tasks))
            began_s = time.perf_counter()
            self._client.get_adapter(name)
            lookup_s.append(time.perf_counter() - began_s)
        pages_s = self._time_pages()
        return Measurement(
            {
                "lookup_ms": 1000 * median(lookup_s),
                "page_ms": 1000 * median(pages_s),
            },
            {"lookup": lookup_s, "page": pages_s},
        )

    def _time_pages(self) -> list[float]:
        pages_s, began_s = [], time.perf_counter()
        for count, _ in enumerate(self._client.list_adapters(page_size=_PAGE_SIZE), 1):
            if count % _PAGE_SIZE == 0:
                pages_s.append(time.perf_counter() - began_s)
                began_s = time.perf_counter()
        return pages_s
