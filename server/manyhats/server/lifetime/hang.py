"""The end of a process in which something hangs: a thread cannot be ended, but can be said to hang, and where."""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import structlog

if TYPE_CHECKING:
    from manyhats.engine.engine import Engine

EXIT_HUNG = 70
"""As the programs of ``sysexits.h`` say that they are at fault themselves."""
_STDERR = 2
# For the log, which may hang in what the engine hangs in.
_LAST_WORDS_S = 5.0
_log = structlog.get_logger("manyhats.process")


def end_when_hung(engine: Engine, limit_s: float) -> None:
    """End this process once the engine has been silent for ``limit_s``, with what hangs on stderr.

    At once: files are written to a temporary place and then moved, and callers see their connections end.
    """

    def end(silent_s: float) -> None:
        # Needs no lock and no interpreter.
        faulthandler.dump_traceback_later(_LAST_WORDS_S, exit=True, file=_STDERR)
        _log.error("the engine hangs; the process ends", silent_s=round(silent_s, 1), where=engine.position)
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        os._exit(EXIT_HUNG)

    engine.call_when_silent(limit_s, end)


def end_at_once(code: int) -> NoReturn:
    """End this process without waiting for its threads: what they write is whole or not there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
