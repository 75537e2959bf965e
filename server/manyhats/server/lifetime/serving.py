"""What answers calls, whatever ports lead to it: the gate, and the backend that is opened behind it."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import disable_created_metrics

from manyhats.adapters.registration import Registration, Uri
from manyhats.engine.progress import Progress
from manyhats.engine.threads.apart import in_thread
from manyhats.engine.threads.openmp import in_own_thread
from manyhats.server.access.tokens import TokenFile
from manyhats.server.http.call import Surroundings
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.exporting import open_tracing
from manyhats.server.lifetime.hang import end_when_hung
from manyhats.server.observability.logs import configure_logs
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.backend import Backend
from manyhats.server.service.call import Calls
from manyhats.server.service.following import StoreFollower
from manyhats.server.service.gate import Gate
from manyhats.server.service.registrations import Registrations

if TYPE_CHECKING:
    from manyhats.adapters.store.store import AdapterStore

Assemble = Callable[[ServeConfig, Metrics, Progress], Backend]

STOP_LIMIT_S = 0.8
"""How long loading, compiling or the engine's step may take to end before it is abandoned."""
_EXPORT_LIMIT_S = 2.0  # of the last spans
_MAX_OTHER_CALLS = 512  # calls without a sequence, or waiting for an adapter or tokenization
_log = structlog.get_logger("manyhats.process")
# Events that progress bars also show, and whose lines would cut through them.
_loading_log = structlog.get_logger("manyhats.loading")


def prepare_process(config: ServeConfig) -> None:
    """Set what holds for the whole process: its logs, and libraries' habits."""
    configure_logs(config.log_format, config.log_level)
    # A text is tokenized on the calling thread (``TextThreads``), not on one thread per processor.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A creation time per series would double their number.
    disable_created_metrics()  # type: ignore[no-untyped-call]


class Serving:
    """One gate, and the backend behind it from its opening to its end.

    Args:
        config: the settings.
        assemble: loads the model and opens the store, in a worker thread; the real ones by default.

    Raises:
        ServerError: spans are to be exported, and cannot be.
    """

    def __init__(self, config: ServeConfig, assemble: Assemble | None = None) -> None:
        self._config = config
        self._assemble = assemble or _open_backend
        self._store: AdapterStore | None = None
        self.metrics = Metrics(max_task_labels=config.max_task_labels)
        # More than the engine accepts, so that it is the engine that reports a full queue.
        max_calls = config.engine.max_waiting + config.engine.max_num_sequences + _MAX_OTHER_CALLS
        self.gate = Gate(heartbeat_limit_s=config.heartbeat_limit_s, max_calls=max_calls)
        self._tracing = open_tracing()
        self.calls = Calls(self.gate, self.metrics, self._tracing)

    def surroundings(self, tokens: TokenFile | None, *, needs_certificate: bool = False) -> Surroundings:
        """What the HTTP calls have around them."""
        return Surroundings(
            calls=self.calls,
            answers=Answers(unread_limit_s=self._config.engine.unread_limit_s),
            tokens=tokens,
            needs_certificate=needs_certificate,
            is_lenient=self._config.openai_lenient,
        )

    async def load(self, stack: AsyncExitStack, progress: Progress) -> Backend:
        """Load the model, and start the engine, which ``stack`` stops.

        Raises:
            ServerError, EngineError, AdapterError: it cannot be served.
        """
        backend = await in_own_thread(self._assemble, self._config, self.metrics, progress)
        self._store = backend.store
        _loading_log.info("starting the engine", note="the first start on a machine compiles its kernels")
        await backend.engine.start()
        stack.push_async_callback(backend.engine.stop, 0.0, STOP_LIMIT_S)
        return backend

    async def register(self, backend: Backend) -> Started:
        """Register what the settings name; the gate stays closed.

        Raises:
            AdapterError: an adapter is refused.
        """
        registrations = Registrations(backend, self.metrics)
        self.metrics.attach(backend)
        registrations.count_all()
        for task_id, uri in self._config.register.items():
            record = (await registrations.register(Registration(task_id, Uri(uri)))).record
            _log.info("registered", adapter=record.name, digest=record.digest)
        await registrations.follow_pins()
        return Started(backend, registrations)

    def open(self, stack: AsyncExitStack, started: Started) -> None:
        """Let calls in, and follow the store until ``stack`` ends."""
        _leave_to_no_collection()
        end_when_hung(started.backend.engine, self._config.hang_limit_s)
        self.gate.open(started.backend)
        period_s = self._config.store_poll_s
        follower = StoreFollower(started.backend, started.registrations, period_s=period_s)
        stack.enter_context(running(follower.follow()))

    async def close(self) -> None:
        """Export the last spans, unless whoever gets them takes long; close the store.

        Last, as calls that end with the ports may still use both.
        """
        if self._tracing is not None:
            closing = asyncio.wrap_future(in_thread(self._tracing.close, "tracing"))
            await asyncio.wait({closing}, timeout=_EXPORT_LIMIT_S)
        if self._store is not None:
            self._store.close()


def _open_backend(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
    # Imported here, in the worker thread: the engine takes seconds to import, and ports may be open by then.
    from manyhats.server.lifetime.wiring import open_backend

    return open_backend(config, metrics, progress)


def _leave_to_no_collection() -> None:
    """Exclude existing objects from garbage collection for good: half a million, which live until the end.

    A collection of all of them stops every thread, and so every stream, for a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def running(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Run something in the background while this is entered."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


@dataclass(frozen=True, slots=True)
class Started:
    """The result of a start."""

    backend: Backend
    registrations: Registrations
