"""Ctrl-C while a model is fetched or loaded: the command ends at once, whatever its libraries are doing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from manyhats.cli.terminal.failures import EXIT_INTERRUPTED

_LIMIT_S = 1.5
_SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def prompt_interrupts() -> Iterator[None]:
    """An interrupt raises ``KeyboardInterrupt``, and ends the process if that does not do so soon.

    Downloads run on threads that are waited for, and some library calls do not return until they are done. Nothing is
    lost by ending in the middle: files are written beside their place and then moved there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    has_left = threading.Event()
    has_word = threading.Lock()  # who says that the command was interrupted

    def end() -> None:
        with has_word:
            if not has_left.is_set():
                typer.echo(f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}interrupted", err=True)
            os._exit(EXIT_INTERRUPTED)

    def received(number: int, frame: FrameType | None) -> None:
        # Python swallows an interrupt that comes in a finalizer or a library's callback, and prints where that was.
        sys.unraisablehook = lambda unraisable: None
        watch = threading.Timer(_LIMIT_S, end)
        watch.daemon = True
        watch.start()
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as in the background of a shell
        yield
        return
    signal.signal(signal.SIGINT, received)
    try:
        yield
    finally:
        with has_word:
            has_left.set()
        signal.signal(signal.SIGINT, before)
