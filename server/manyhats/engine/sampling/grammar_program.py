"""The program in which callers' grammars are compiled first: a separate process, with bounds.

A compilation cannot be interrupted, may take minutes, and crashes on some grammars that nest deeply. Whatever passes
here does none of this in the server. ``grammars`` is the other end.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from manyhats.engine.constraint import Constraint
from manyhats.engine.sampling.grammar_library import (
    RefusedError,
    Vocabulary,
    compiled,
    make_vocabulary,
    message_of,
    notation,
    refusal_of,
)
from manyhats.engine.threads.programs import answer_requests, bounded, prepare_program

_MEMORY_BYTES = 4 * 1024 * 1024 * 1024
_KEPT_MEMORY_BYTES = 1024 * 1024 * 1024
# A quarter of what the server's threads have, so that what passes here has room there.
_STACK_BYTES = 2 * 1024 * 1024


def main() -> None:
    """Answer requests; an answer is a JSON object, with ``error`` if the grammar was refused."""
    prepare_program()
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(
        target=answer_requests, args=(_Checks(),), kwargs={"kept_memory_bytes": _KEPT_MEMORY_BYTES}
    )
    thread.start()
    thread.join()


class _Checks:
    """Compiles grammars on the last vocabulary that it was sent."""

    def __init__(self) -> None:
        self._key: object = None
        self._vocabulary: Vocabulary | None = None

    def __call__(self, request: dict[str, Any]) -> Mapping[str, object]:
        if "vocabulary" in request:
            self._vocabulary = make_vocabulary(**request["vocabulary"])
            self._key = request["key"]
        if self._vocabulary is None or self._key != request["key"]:
            return {"needs_vocabulary": True}
        with bounded(request["compile_cpu_s"], _MEMORY_BYTES):
            return _check(self._vocabulary, request["constraint"])


def _check(vocabulary: Vocabulary, constraint: Constraint) -> Mapping[str, object]:
    try:
        state = compiled(vocabulary, notation(constraint)).deep_copy()
        state.compute_bitmask()
    except RefusedError as error:
        return {"error": refusal_of(vocabulary, constraint, error)}
    return {"error": message_of(state)} if state.is_error() else {}


if __name__ == "__main__":
    main()
