"""Registrations by request id: the same id and content again gets the first answer, and does nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import ArgumentInvalidError, RequestIdReusedError
from manyhats.adapters.store.catalogue.database import WriteTransaction
from manyhats.adapters.store.catalogue.documents import read_record, record_document
from manyhats.adapters.store.catalogue.tables import ANSWERS

MAX_REMEMBERED = 10_000

_MAX_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Registration:
    """The answer to a registration; ``created`` is false where the version existed, or was validated only."""

    record: AdapterRecord
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationBody:
    """Everything that a registration asks for.

    Attributes:
        sources: what it is made of, as the caller puts it; a tuple for each piece, its kind first.
        request_id: names the call; empty for none, which nobody remembers.
        assume_base: it is meant for the store's base, whatever name it records.
    """

    task_id: str
    sources: tuple[tuple[str | int | float, ...], ...]
    activate: bool
    validate_only: bool
    expected_digest: str
    labels: Mapping[str, str]
    request_id: str = ""
    assume_base: bool = False

    def fingerprint(self) -> str:
        """One digest of all fields but the request id."""
        asked: list[object] = [
            self.task_id,
            self.sources,
            self.activate,
            self.validate_only,
            self.expected_digest,
        ]
        if self.assume_base:
            asked.append("assume_base")
        return hashlib.sha256(json.dumps([*asked, sorted(self.labels.items())]).encode()).hexdigest()


def check_request_id(request_id: str) -> None:
    """Accept an id, or the empty one, which is remembered by nobody.

    Raises:
        ArgumentInvalidError: it is too long or not printable.
    """
    if len(request_id) > _MAX_ID_LENGTH or not request_id.isprintable():
        raise ArgumentInvalidError("request_id", f"has at most {_MAX_ID_LENGTH} printable characters")


def read_answer(connection: Connection, body: RegistrationBody) -> Registration | None:
    """The answer that the body's request id was given; None if it is new.

    Raises:
        RequestIdReusedError: it was used for something else.
    """
    row = connection.execute(select(ANSWERS).where(ANSWERS.c.request_id == body.request_id)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != body.fingerprint():
        raise RequestIdReusedError("request_id", "was used before, for a registration with other content")
    return Registration(read_record(row.record), row.created)


def write_answer(transaction: WriteTransaction, body: RegistrationBody, answer: Registration) -> None:
    """Keep the answer to a new request id; of more than ``MAX_REMEMBERED``, the oldest go."""
    if not body.request_id:
        return
    row = {
        "request_id": body.request_id,
        "fingerprint": body.fingerprint(),
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
