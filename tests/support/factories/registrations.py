"""Checks of registrations, for the tests of the adapter store."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.store import AdapterStore


def nobody(record: AdapterRecord) -> bool:
    """An ``in_use`` of a server without requests."""
    return False


def assert_refused(
    store: AdapterStore, source: Path, error: type[AdapterError], subject: str, uri: str | None = None
) -> None:
    """Registration raises exactly this error for exactly this subject, and leaves no trace.

    The store lies in ``store`` next to ``source``.
    """
    artifacts = source.parent / "store"
    before = sorted(artifacts.rglob("*"))
    with pytest.raises(error) as caught:
        store.register(Registration("task", Uri(str(source) if uri is None else uri)))
    assert type(caught.value) is error
    assert subject in caught.value.subject
    assert store.list().records == ()
    assert sorted(artifacts.rglob("*")) == before
    assert str(artifacts) not in str(caught.value)
    assert str(caught.value).isprintable()
