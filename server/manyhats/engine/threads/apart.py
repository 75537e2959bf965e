"""Work that may never return, each on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """The result of work on a new thread, which yields to others as a background thread does.

    The process does not wait for it at its end.
    """
    future: Future[T] = Future()

    def run() -> None:
        # Imported here: torch takes seconds.
        from manyhats.engine.threads.background import begin_thread

        begin_thread()
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 whatever it was, whoever waits must see it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
