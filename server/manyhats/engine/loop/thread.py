"""The engine's own thread: commands go in through an inbox, events come out through streams."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.wants import Logits
from manyhats.engine.loop.job import Event
from manyhats.engine.loop.private_run import PrivateRun
from manyhats.engine.loop.step import Step
from manyhats.engine.loop.streams import Streams
from manyhats.engine.loop.watch import Watch
from manyhats.engine.output import StepStats
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from manyhats.engine.threads.processors import TakenProcessors

_HEARTBEAT_S = 0.5
_PAUSED_S = 0.05
_RETRY_S = 0.002
_log = structlog.get_logger(__name__)

Command = Callable[[], tuple[Event, ...]]
"""Something for the engine's thread to do between steps; its events are published with the next step's."""


class Loop:
    """Runs steps on its own thread until it is stopped.

    Args:
        step: only used by the thread while that runs.
        streams: receive the events of each turn.
        backend: told before each step how many processors to leave free.
        taken: counts the processors that other processes take.
        prepare: called first, on the thread.

    Attributes:
        on_step: called with each step's statistics, on the thread.
        failure: the error that ended the thread, if any.
        heartbeat_s: ``time.time()`` of the last turn, unless there are jobs of which none got on.
        watch: says for how long there has been none.
    """

    def __init__(
        self,
        step: Step,
        streams: Streams,
        backend: Backend,
        taken: TakenProcessors,
        prepare: Callable[[], None],
    ) -> None:
        self.step = step
        self.streams = streams
        self.on_step: Callable[[StepStats], None] = lambda stats: None
        self._backend = backend
        self._taken = taken
        self._prepare = prepare
        self._ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._prepared: Future[None] = Future()
        self._is_stopping = False
        self._is_stuck = False
        self.watch = Watch(lambda: self.heartbeat_s, lambda: self._is_stuck, lambda: step.allowance.seconds)
        self.failure: BaseException | None = None
        self.heartbeat_s = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether it is running."""
        return self._thread.is_alive() and self.failure is None

    def start(self) -> Future[None]:
        """Start, once; the future is done when the thread is prepared, or failed to be and ended."""
        self._thread.start()
        return self._prepared

    def submit(self, command: Command) -> None:
        """Have something done between two steps; callable from any thread."""
        self._inbox.put(command)

    def new_id(self) -> str:
        """A unique job id; callable from any thread."""
        return str(next(self._ids))

    def forget(self, virtual: VirtualTokens) -> None:
        """Have the blocks of virtual tokens freed before the next step; no unfinished sequence may use them."""

        def command() -> tuple[Event, ...]:
            self.step.scheduler.forget(virtual)
            return ()

        self.submit(command)

    def run(self, prompt: PrivateRun) -> Logits:
        """Run an internal prompt alongside requests and wait for its logits; callable from any other thread.

        Raises:
            EngineError: the error that ended it.
        """
        logits = self.streams.expect(prompt.id)
        self.submit(lambda: self.step.add(prompt))
        result: Logits = logits.result()
        return result

    def wake(self) -> None:
        """Wake the thread to check for work; callable from any thread."""
        self._inbox.put(None)

    @property
    def position(self) -> str:
        """Where the thread is now, its innermost call last; callable from any other thread."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def stop(self) -> None:
        """Ask the thread to end after the current step; callable from any thread."""
        self._is_stopping = True
        self._inbox.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread to end; returns at once if it never started."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._backend.start_thread()
            self._prepare()
        except BaseException as error:  # noqa: BLE001 whatever it was, its starter must see the error
            self.failure = error
            self._prepared.set_exception(error)
            return
        self.heartbeat_s = time.time()
        self.watch.start(threading.current_thread())
        self._prepared.set_result(None)
        try:
            while not self._is_stopping:
                self._turn()
        except BaseException as error:  # noqa: BLE001 whatever it was, every caller must be told that the engine is gone
            self.failure = error
        self.step.settle()  # before anybody takes back what it uses
        self.watch.stop()
        self.streams.end("the engine has ended" if self.failure is None else "the engine failed")
        if self.failure is not None:
            _log.error("engine died", exc_info=self.failure)

    def _turn(self) -> None:
        events = self._take_commands()
        if self.step.has_work:
            self._backend.leave_processors(self._taken.count())
            result = self.step.run()
            events += result.events
            if result.stats is not None:
                self.on_step(result.stats)
            elif result.is_stuck:
                time.sleep(_RETRY_S)
            self._note_stuck(result.is_stuck)
        else:
            self._note_stuck(False)
        if not self._is_stuck:
            self.heartbeat_s = time.time()
        if not self.streams.publish(events, is_in_flight=self.step.is_in_flight):
            self._is_stopping = True

    def _note_stuck(self, is_stuck: bool) -> None:
        """Log when jobs stop to get on, which should never happen, and when they do again."""
        if is_stuck == self._is_stuck:
            return
        self._is_stuck = is_stuck
        if is_stuck:
            scheduler = self.step.scheduler
            _log.warning("no request gets on", running=scheduler.num_running, waiting=scheduler.num_waiting)
        else:
            _log.info("requests get on again")

    def _take_commands(self) -> list[Event]:
        """Run the queued commands; wait for one if there is nothing to do."""
        events: list[Event] = []
        wait = self.step.is_idle
        limit_s = _PAUSED_S if self.step.has_work else _HEARTBEAT_S  # paused jobs still have time limits
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
