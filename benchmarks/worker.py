"""A system in a process of its own, so that each has its own thread pools and memory."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

_END_S = 10.0


class WorkerError(Exception):
    """The worker's call failed; the text is its traceback."""


class Worker:
    """Makes an object in a new process, and calls its methods.

    Args:
        make: a function of a module, which the process imports.
        args: its arguments; they travel by pickle.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def wait_ready(self) -> None:
        """Returns when the object is made; without it, the first call waits.

        Raises:
            WorkerError: it could not be made.
        """
        if not self._is_ready:
            self._receive()
            self._is_ready = True

    def call(self, method: str, *args: Any) -> Any:
        """The method's result.

        Raises:
            WorkerError: it raised, or the process ended.
        """
        self.wait_ready()
        self._connection.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            is_good, result = self._connection.recv()
        except EOFError as error:
            self._process.join(_END_S)
            raise WorkerError(f"the worker ended with exit code {self._process.exitcode}") from error
        if not is_good:
            raise WorkerError(result)
        return result


def _serve(connection: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The worker's life: makes the object, says so, then answers calls until the other end is closed."""
    with suppress(EOFError, KeyboardInterrupt):
        is_made, target = _attempt(make, args)
        connection.send((is_made, None if is_made else target))
        while is_made:
            method, arguments = connection.recv()
            connection.send(_attempt(_call, (target, method, arguments)))


def _call(target: Any, method: str, args: tuple[Any, ...]) -> Any:
    return getattr(target, method)(*args)


def _attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it went well, and the result or the traceback."""
    try:
        return True, function(*args)
    except Exception:  # noqa: BLE001  (whatever it is, the caller gets it)
        return False, traceback.format_exc()
