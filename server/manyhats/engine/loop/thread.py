"""The engine's own thread: commands go in through an inbox, events come out through a callback."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from manyhats.engine.loop.internal_jobs import Command
from manyhats.engine.loop.jobs import Event
from manyhats.engine.loop.step import Engine
from manyhats.engine.output import StepStats

_HEARTBEAT_S = 0.5
_PAUSED_S = 0.05
_RETRY_S = 0.002
_STANDSTILL_S = 5.0
_log = structlog.get_logger(__name__)


class EngineThread:
    """Turns an engine's steps for as long as it is asked to. All callbacks are called on the thread.

    Args:
        engine: nobody else touches it while the thread runs.
        prepare: called first.
        before_step: called before each step.
        publish: takes the events of a turn; returns whether anyone is still listening.
        on_step: takes the statistics of a step.
        on_end: called last, however the thread ends.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        prepare: Callable[[], None],
        before_step: Callable[[], None],
        publish: Callable[[list[Event]], bool],
        on_step: Callable[[StepStats], None],
        on_end: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._prepare = prepare
        self._before_step = before_step
        self._publish = publish
        self._on_step = on_step
        self._on_end = on_end
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._prepared: Future[None] = Future()
        self._is_stopping = False
        self._stuck_since_s: float | None = None
        self.is_at_standstill = False
        self.failure: BaseException | None = None
        self.heartbeat_s = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive() and self.failure is None

    def start(self) -> Future[None]:
        """Begins, once; done when the thread is prepared, or has failed to be and ended."""
        self._thread.start()
        return self._prepared

    def submit(self, command: Command) -> None:
        """Has something done between two steps; from any thread."""
        self._inbox.put(command)

    def wake(self) -> None:
        """Has it look now whether what it waits for is there; from any thread."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Asks it to end after the step at hand; from any thread."""
        self._is_stopping = True
        self._inbox.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Waits for its end; returns at once where it never began."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._prepare()
        except BaseException as error:  # noqa: BLE001 whatever it was, its starter must see the error
            self.failure = error
            self._prepared.set_exception(error)
            return
        self.heartbeat_s = time.time()
        self._prepared.set_result(None)
        try:
            while not self._is_stopping:
                self._turn()
        except BaseException as error:  # noqa: BLE001 whatever it was, every caller must be told that the engine is gone
            self.failure = error
        self._on_end()
        if self.failure is not None:
            _log.error("engine died", exc_info=self.failure)

    def _turn(self) -> None:
        events = self._take_commands()
        if self._engine.has_work:
            self._before_step()
            result = self._engine.step()
            events += result.events
            if result.stats is not None:
                self._on_step(result.stats)
            elif result.is_stuck:
                time.sleep(_RETRY_S)
            self._note_standstill(result.is_stuck)
        self.heartbeat_s = time.time()
        if not self._publish(events):
            self._is_stopping = True

    def _note_standstill(self, is_stuck: bool) -> None:
        """There should be none; if there is, whoever sends requests here must be told."""
        if not is_stuck:
            if self.is_at_standstill:
                _log.info("requests get on again")
            self._stuck_since_s, self.is_at_standstill = None, False
            return
        now_s = time.monotonic()
        if self._stuck_since_s is None:
            self._stuck_since_s = now_s
        elif now_s - self._stuck_since_s >= _STANDSTILL_S and not self.is_at_standstill:
            self.is_at_standstill = True
            scheduler = self._engine.scheduler
            _log.error("no request gets on", running=scheduler.num_running, waiting=scheduler.num_waiting)

    def _take_commands(self) -> list[Event]:
        """Does what was asked for; waits for something to do where there is nothing."""
        events: list[Event] = []
        wait = self._engine.is_idle
        limit_s = _PAUSED_S if self._engine.has_work else _HEARTBEAT_S  # what is paused still has its clock
        while True:
            try:
                command = self._inbox.get(block=wait, timeout=limit_s if wait else None)
            except queue.Empty:
                return events
            if command is not None:
                try:
                    events += command()
                except Exception as error:  # noqa: BLE001 one thing undone must not end all that runs
                    _log.error("a command to the engine failed", exc_info=error)
            wait = False
