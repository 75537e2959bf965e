"""Registrations by request id: repeating the same id and content returns the first answer, and does nothing."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from manyhats.adapters.errors import RequestIdReusedError
from manyhats.adapters.registration import Registered, Registration
from manyhats.adapters.store.catalogue.database import WriteTransaction
from manyhats.adapters.store.catalogue.documents import read_record, record_document
from manyhats.adapters.store.catalogue.tables import ANSWERS

MAX_REMEMBERED = 10_000


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
