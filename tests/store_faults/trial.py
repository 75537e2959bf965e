"""One interruption: a child does an operation and comes to harm at one call; another looks at what it left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhats.adapters.errors import AdapterError
from store_faults.preload import Action, Shim
from store_faults.scenarios import (
    Scenario,
    State,
    check_whole,
    make_sources,
    open_scenario_store,
    state_of,
)


@dataclass(frozen=True, slots=True)
class Harm:
    """What happens at a call.

    Attributes:
        name: as the table shows it.
        action: of the shim.
        error: of a failing call, its ``errno``.
        with_reads: whether calls that change nothing are harmed, too.
        letters: the calls at which it makes sense; empty for all.
        goes_on: whether a process whose call failed repeats the operation, or ends.
    """

    name: str
    action: Action
    error: int = 0
    with_reads: bool = False
    letters: str = ""
    goes_on: bool = False


class Bench:
    """A scenario's directories: the sources, the prepared store, and a copy of it for each trial.

    Everything that opens a store is done by children, so that each begins like a process that was just started.

    Attributes:
        old: the state before the operation.
        new: the state after it.
    """

    def __init__(self, scenario: Scenario, directory: Path, shim: Shim) -> None:
        self._scenario = scenario
        self._shim = shim
        self._sources = directory / "sources"
        self._template = directory / "template"
        self._directory = directory / "store"
        make_sources(self._sources)
        in_child(self._prepare)
        self._reset()
        self.old, self.new = in_child(self._do)

    def calls(self, harm: Harm) -> str:
        """The calls of an operation that comes to no harm, a letter each."""
        self._reset()
        return str(in_child(lambda: self._count(harm.with_reads)))

    def try_harm(self, harm: Harm, call: int) -> bool:
        """Do harm at one call, from 1, and check what is left.

        Returns:
            Whether it left the new state; else it left the old one.

        Raises:
            AssertionError: it left neither; or bytes were lost or left over, or something does not work afterwards.
        """
        self._reset()
        seen = in_child(lambda: self._do_harm(harm, call))
        left = in_child(self._inspect)
        assert seen in (None, left), "the process saw another state than it left"
        return bool(left == self.new)

    def _reset(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._template.exists():
            shutil.copytree(self._template, self._directory)

    def _prepare(self) -> None:
        if self._scenario.prepare is not None:
            self._scenario.prepare(self._template, self._sources)

    def _do(self) -> tuple[State, State]:
        store = open_scenario_store(self._directory, self._sources)
        old = state_of(store)
        self._scenario.act(store, self._sources)
        new = state_of(store)
        check_whole(store, self._directory)
        store.close()
        return old, new

    def _count(self, with_reads: bool) -> str:
        store = self._open_unless_counted()
        self._shim.arm(self._directory, Action.COUNT, with_reads=with_reads)
        store = store or open_scenario_store(self._directory, self._sources)
        self._scenario.act(store, self._sources)
        trace = self._shim.disarm()
        store.close()
        return trace

    def _do_harm(self, harm: Harm, call: int) -> State | None:
        """Killed, or gives the state that the process saw after it; None if it could not even open the store."""
        store = self._open_unless_counted()
        self._shim.arm(self._directory, harm.action, call, with_reads=harm.with_reads, error=harm.error)
        is_done = False
        try:
            store = store or open_scenario_store(self._directory, self._sources)
            self._scenario.act(store, self._sources)
            is_done = True
        except AdapterError:
            pass
        finally:
            trace = self._shim.disarm()
        assert len(trace) >= call, "the call was not reached"
        assert harm.action in (Action.FAIL_ONCE, Action.FAIL_FROM), "was not killed"
        if store is None:
            return None
        assert state_of(store) in ([self.new] if is_done else [self.old, self.new])
        if harm.goes_on:
            self._scenario.act(store, self._sources)
        seen = state_of(store)
        store.close()
        return seen

    def _open_unless_counted(self) -> Any:
        return None if self._scenario.with_opening else open_scenario_store(self._directory, self._sources)

    def _inspect(self) -> State:
        """What a new process finds; then the operation, again, must do what it always does."""
        store = open_scenario_store(self._directory, self._sources)
        left = state_of(store)
        assert left in (self.old, self.new), f"{left} is neither old nor new"
        check_whole(store, self._directory)
        self._scenario.act(store, self._sources)
        assert state_of(store) == self.new, "the operation does not end in the new state any more"
        check_whole(store, self._directory)
        store.close()
        store = open_scenario_store(self._directory, self._sources)
        assert state_of(store) == self.new
        check_whole(store, self._directory)
        store.close()
        return left


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a forked process; None if that was killed.

    Raises:
        AssertionError: it raised something.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _answer(work, write_end)
    os.close(write_end)
    with open(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, text
    return json.loads(text)


def _answer(work: Callable[[], Any], write_end: int) -> None:
    """Write the result as JSON, or what went wrong as text, and end the process."""
    code = 1
    try:
        text = json.dumps(work())
        code = 0
    except BaseException:  # noqa: BLE001 - the parent shows it
        text = traceback.format_exc()
    with open(write_end, "w") as pipe:
        pipe.write(text)
    os._exit(code)
