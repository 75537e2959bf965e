"""One call of the API, whatever the transport, and what surrounds every call."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from manyhats.adapters.errors import shown
from manyhats.engine.errors import FieldInvalidError, NoMemoryError, is_out_of_memory
from manyhats.server.access.rules import check_access
from manyhats.server.access.tokens import Caller
from manyhats.server.observability.traceparent import Parent, new_trace_id
from manyhats.server.observability.work import Work
from manyhats.server.service.errors import UnexpectedError
from manyhats.server.service.gate import Gate, ServingState
from manyhats.server.service.reasons import is_expected, reason_of

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.observability.tracing import Tracing

MAX_REQUEST_ID_LENGTH = 128
# A caller whose deadline passes cancels slightly before the deadline by this server's clock.
_DEADLINE_SLACK_S = 0.1
_TIMED_METHODS = frozenset(
    {
        "Generate",
        "GenerateStream",
        "Score",
        "ChatCompletions",
        "Completions",
        "Responses",
        "Embed",
        "Classify",
        "ClassifyTokens",
        "Rerank",
    }
)
_log = structlog.get_logger("manyhats.calls")


@dataclass(slots=True, kw_only=True)
class Call:
    """One call: what is known as it arrives, and then what its message says.

    Attributes:
        method: the API's name for what is called.
        caller: who makes it.
        received_s, deadline_s: on ``time.monotonic()``'s clock; None for no deadline.
        id: unique in this process, whereas callers may repeat their ids.
        request_id: the caller's, or else ``id``; used in replies and logs.
        name: the task or version it names first, "" for none; None before it has a message that could name one.
        version: what the name stood for when that was first asked; all of a call runs on one version.
        parent: the span of its caller's, of which it is part; None if it has named none.
        trace_id: of the trace that it is part of, in hexadecimal; "" for none.
        work: what the engine does for it.
    """

    method: str
    caller: Caller
    received_s: float = field(default_factory=time.monotonic)
    deadline_s: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    request_id: str = ""
    name: str | None = None
    version: AdapterRecord | None = None
    parent: Parent | None = None
    trace_id: str = ""
    work: Work = field(default_factory=Work)

    def names(self, name: str | None) -> None:
        """Note the task or version that a message of this call names, "" for none; None if it has no such field.

        Raises:
            TaskNotAllowedError: the caller's scope does not cover it.
        """
        if self.name is None:
            self.name = name
        if self.caller.name:
            structlog.contextvars.bind_contextvars(caller=self.caller.name)
        check_access(self.method, None if name is None else task_of(name), self.caller)

    def identify(self, request_id: str) -> None:
        """Set the caller's id for it; "" for none.

        Raises:
            FieldInvalidError: it is too long, or would not fit on a log line.
        """
        if len(request_id) > MAX_REQUEST_ID_LENGTH or not request_id.isprintable():
            raise FieldInvalidError(
                "request_id", f"must have at most {MAX_REQUEST_ID_LENGTH} printable characters"
            )
        self.request_id = request_id or self.id
        structlog.contextvars.bind_contextvars(request_id=self.request_id)

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed, or is about to."""
        return self.deadline_s is not None and self.deadline_s - time.monotonic() <= _DEADLINE_SLACK_S


class Calls:
    """What surrounds every call: admission, metrics, one log line, its span, and logging of unexpected errors.

    Args:
        gate: admits calls, and knows the backend.
        metrics: counts them.
        tracing: makes spans of them; None for none.
    """

    def __init__(self, gate: Gate, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.gate = gate
        self.metrics = metrics
        self._tracing = tracing
        metrics.attach_readiness(lambda: gate.state is ServingState.READY)

    @contextmanager
    def observed(self, call: Call) -> Iterator[None]:
        """Hold a call inside the gate, and account for it when it ends, before its caller learns of an error.

        Raises:
            ServerError, EngineError: it is not admitted.
            UnexpectedError: instead of an unexpected exception, which is logged in full.
            NoMemoryError: instead of one that says that there is no memory.
        """
        structlog.contextvars.clear_contextvars()
        self._trace(call)
        try:
            with self.gate.admitted():
                yield
        except asyncio.CancelledError:
            self._finished(call, "DEADLINE_EXCEEDED" if call.is_late else "CANCELLED")
            raise
        except Exception as error:
            self._finished(call, reason_of(error).code)
            if is_expected(error):
                raise
            if is_out_of_memory(error):
                _log.error("no memory for a call", method=call.method, exc_info=error)
                raise NoMemoryError from error
            error_id = uuid.uuid4().hex
            _log.error("unexpected error", method=call.method, error_id=error_id, exc_info=error)
            raise UnexpectedError(error_id) from error
        self._finished(call, "OK")

    def _trace(self, call: Call) -> None:
        """Let log lines show which trace a call is part of: its caller's, or one that begins here."""
        if call.parent is not None:
            call.trace_id = call.parent.trace_id
        elif self._tracing is not None:
            call.trace_id = new_trace_id()
        if call.trace_id:
            structlog.contextvars.bind_contextvars(trace_id=call.trace_id)

    def _finished(self, call: Call, code: str) -> None:
        seconds = time.monotonic() - call.received_s
        is_timed = call.method in _TIMED_METHODS and call.name is not None
        # No name means the base model for methods that run one, and no task for others.
        task_id = task_of(call.name or "") if call.name or is_timed else None
        self.metrics.call_finished(call.method, task_id, code, seconds if is_timed else None)
        _log.info(
            "call", method=call.method, task=shown(call.name or ""), code=code, seconds=round(seconds, 4)
        )
        if self._tracing is not None:
            self._tracing.record(call, code)


def task_of(name: str) -> str:
    """The task id in ``task`` or ``task@3``, or "" for the base model; the name need not be valid."""
    return name.partition("@")[0]
