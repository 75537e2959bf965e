"""Input and output that fails on purpose: the n-th call of an operation, whichever call that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Engine, event

CALLS = (
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "link"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "unlink"),
    (os, "stat"),
    (os, "listdir"),
    (os, "scandir"),
    (os, "pread"),
    (os, "preadv"),
    (os, "pwrite"),
    (os, "write"),
    (os, "ftruncate"),
    (fcntl, "flock"),
    (fcntl, "lockf"),
)


@dataclass
class FailingCalls:
    """Counts calls; the one of number ``fail_at`` (from 1) and, if ``stays``, every one after it raises.

    Attributes:
        made: names of the calls so far, in order.
        failed: names of those that were made to fail.
    """

    fail_at: int
    stays: bool = False
    code: int = errno.EIO
    made: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def count(self, name: str) -> bool:
        """Whether this call is to fail."""
        self.made.append(name)
        number = len(self.made)
        fails = number == self.fail_at or (self.stays and number > self.fail_at)
        if fails:
            self.failed.append(name)
        return fails


@contextlib.contextmanager
def failing(calls: FailingCalls) -> Iterator[FailingCalls]:
    """Make calls to the file system and statements of SQLite fail inside the block."""

    def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        if calls.count("statement"):
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, _wrapped(calls, name, getattr(module, name)))
        event.listen(Engine, "do_execute", execute)
        try:
            yield calls
        finally:
            event.remove(Engine, "do_execute", execute)


def _wrapped(calls: FailingCalls, name: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if calls.count(name):
            raise OSError(calls.code, os.strerror(calls.code), "/secret/path")
        return original(*args, **kwargs)

    return call
