"""Separate processes for work on untrusted input, with bounds of time and memory: both ends of them.

Whatever such a process does, it cannot hold up or end the server: it is killed, and replaced.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

# None of this process's credentials: what runs there is untrusted.
_HANDED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "TZ")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_LENGTH_BYTES = 8
_TIME_IS_UP = signal.SIGPROF
"""The signal that ends a program when a request has used up its time."""
_IS_LAST = "is_last"
"""Key of an answer after which a program takes no more requests: it has grown too large."""


class EndedError(Exception):
    """A program ended on a request."""


class TooSlowError(EndedError):
    """The request took too much processor time, or too long."""


class Programs:
    """Processes of one program that take requests in turn, started as needed. Thread-safe.

    No request suffers from what others left in a process: if one dies on a request, other than by its time limit, a
    fresh one replaces it and repeats the request.

    Args:
        module: the program's name; its ``main`` calls ``answer_requests``.
        count: how many are kept for the next request.
    """

    def __init__(self, module: str, count: int) -> None:
        self._module = module
        self._count = count
        self._idle: list[_Program] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._idle)

    def ask(self, request: Mapping[str, object], patience_s: float) -> dict[str, Any]:
        """A program's answer.

        Args:
            request: pickled.
            patience_s: how long to wait for it; a program has bounds of its own for processor time.

        Raises:
            EndedError: there is none.
        """
        content = pickle.dumps(request)
        with self._lock:
            program = self._idle.pop() if self._idle else None
        if program is not None:
            try:
                return self._ask_one(program, content, patience_s)
            except TooSlowError:
                raise
            except EndedError:
                pass  # it may have died while idle, or from what earlier requests left in it
        return self._ask_one(_Program(self._module), content, patience_s)

    def close(self) -> None:
        """End the idle processes; busy ones end with their work."""
        with self._lock:
            _end_all(self._idle)

    def _ask_one(self, program: _Program, content: bytes, patience_s: float) -> dict[str, Any]:
        try:
            answer = program.ask(content, patience_s)
        except BaseException:
            program.end()
            raise
        with self._lock:
            if not answer.pop(_IS_LAST, False) and len(self._idle) < self._count:
                self._idle.append(program)
                return answer
        program.end()
        return answer


def _end_all(programs: list[_Program]) -> None:
    while programs:
        programs.pop().end()


class _Program:
    """One process, which answers one request at a time."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _HANDED_ON if name in os.environ} | _ENVIRONMENT,
            start_new_session=True,
        )

    def ask(self, content: bytes, patience_s: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            EndedError: there is none.
        """
        is_late = threading.Event()

        def end_late() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(patience_s, end_late)
        timer.daemon = True
        timer.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(len(content).to_bytes(_LENGTH_BYTES, "big") + content)
            self._process.stdin.flush()
            length = int.from_bytes(_read(self._process.stdout, _LENGTH_BYTES), "big")
            answer: dict[str, Any] = json.loads(_read(self._process.stdout, length))
        except (OSError, ValueError) as error:
            self._process.kill()
            if is_late.is_set() or self._process.wait() == -_TIME_IS_UP:
                raise TooSlowError from error
            raise EndedError from error
        finally:
            timer.cancel()
        return answer

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # whatever it was not sent is no longer of use
        self._process.wait()


def _read(pipe: IO[bytes], num_bytes: int) -> bytes:
    content = pipe.read(num_bytes)
    if len(content) < num_bytes:
        raise ValueError("the pipe ended")
    return content


# In the program.


def prepare_program() -> None:
    """Be the process of a program; called first, on its main thread."""
    # Ctrl-C at the server's terminal is for the server to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(_TIME_IS_UP, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer_requests(
    answer: Callable[[dict[str, Any]], Mapping[str, object]], *, kept_memory_bytes: int
) -> None:
    """Answer each request from the input on the output, until the input ends.

    Args:
        answer: from a request to its answer, a JSON object.
        kept_memory_bytes: having grown by more than this, the process takes no more requests.
    """
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write between answers
    most_bytes = _address_space_bytes() + kept_memory_bytes
    while length := source.read(_LENGTH_BYTES):
        request: dict[str, Any] = pickle.loads(source.read(int.from_bytes(length, "big")))
        answered = answer(request)
        _send(target, {**answered, _IS_LAST: _address_space_bytes() > most_bytes})


def _send(target: BinaryIO, answer: Mapping[str, object]) -> None:
    content = json.dumps(answer).encode()
    target.write(len(content).to_bytes(_LENGTH_BYTES, "big") + content)
    target.flush()


def _address_space_bytes() -> int:
    """What counts against the memory bound; 0 if the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[0]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


@contextmanager
def bounded(cpu_s: float, memory_bytes: int) -> Iterator[None]:
    """Limit this block to that much processor time, and the process to that much memory in total.

    Beyond the first, the process is killed. What is done between requests is trusted, and has no bounds.
    """
    own, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (own, most))
