"""Registrations as callers see them, and what they leave in the catalogue and the store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from manyhats.client import Client
from recording.exact import Recorded, exact, file_digests
from recording.inputs import Subject
from recording.refusals import outcome

_JSON_COLUMNS = ("details", "record")


def register_tasks(client: Client, subject: Subject, adapters: Path) -> dict[str, Recorded]:
    """Register every task, every second one by upload; task → the registration, or why it is refused."""
    made: dict[str, Recorded] = {}
    for index, (task, directory) in enumerate(subject.tasks.items()):
        options: Any = {"request_id": f"register {task}", "labels": {"owner": f"team {index % 3}"}}
        if index % 2:
            made[task] = outcome(client.upload_adapter, task, adapters / directory, **options)
        else:
            made[task] = outcome(client.register_adapter, task, directory, **options)
    for task, parts in subject.composed.items():
        made[task] = outcome(client.register_adapter, task, parts=list(parts.items()))
    return made


def change_tasks(client: Client, subject: Subject, adapters: Path) -> dict[str, Recorded]:
    """What else registrations come to, and the other calls; step → what it gives.

    Ends with more versions and fewer tasks than before.
    """
    first, second, third, *_ = subject.tasks.items()
    again: Any = {"request_id": f"register {first[0]}", "labels": {"owner": "team 0"}}
    calls: Mapping[str, Callable[[], object]] = {
        "same again": lambda: client.register_adapter(first[0], first[1]),
        "same request": lambda: client.register_adapter(first[0], first[1], **again),
        "same request, other labels": lambda: client.register_adapter(
            first[0], first[1], request_id=again["request_id"]
        ),
        "only checked": lambda: client.register_adapter("checked", first[1], validate_only=True),
        "checked by request": lambda: client.register_adapter(
            "checked", first[1], validate_only=True, request_id="check"
        ),
        "second version": lambda: client.register_adapter(first[0], second[1], activate=False),
        "assumed base": lambda: client.register_adapter(
            "assumed", third[1], assume_base=True, request_id="assume"
        ),
        "upload of the same": lambda: client.upload_adapter(first[0], adapters / second[1]),
        "with the right digest": lambda: client.register_adapter(
            "expected", first[1], expected_digest=client.get_adapter(f"{first[0]}@1").digest
        ),
        "activated": lambda: client.activate_adapter(f"{first[0]}@2"),
        "activated back": lambda: client.activate_adapter(f"{first[0]}@1"),
        "deleted version": lambda: client.delete_adapter("assumed@1"),
        "deleted task": lambda: client.delete_adapter("expected"),
        "after a deletion": lambda: client.register_adapter("expected", second[1]),
        "list": lambda: list(client.list_adapters(page_size=5)),
    }
    return {name: outcome(call) for name, call in calls.items()}


def record_store(store: Path) -> dict[str, Recorded]:
    """Sections ``catalogue`` (the tables' rows) and ``store`` (all other files) of a server that has stopped."""
    (database,) = (path for path in store.iterdir() if _is_database(path))
    drawn = ("catalogue-id", database.name)  # an id drawn at random, also in the database
    files = file_digests(store).items()
    others: Recorded = {name: value for name, value in files if not name.startswith(drawn)}
    return {"catalogue": _tables(database), "store": others}


def _is_database(path: Path) -> bool:
    return path.is_file() and path.open("rb").read(15) == b"SQLite format 3"


def _tables(database: Path) -> dict[str, Recorded]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
        schema = {row["name"]: row["sql"] for row in connection.execute(query)}
        tables = [name for name, sql in schema.items() if sql.startswith("CREATE TABLE")]
        return {
            "schema": exact(schema),
            **{name: _rows(connection.execute(f'SELECT * FROM "{name}"')) for name in tables},
        }


def _rows(found: sqlite3.Cursor) -> Recorded:
    rows = []
    for row in found:
        content = dict(row)
        for column in _JSON_COLUMNS:
            if column in content:
                content[column] = json.loads(content[column])
        rows.append(exact(content))
    return sorted(rows, key=str)
