"""The program in which untrusted templates and tokenizers run: a separate process, with bounds.

It reads requests from its input and answers each on its output, until the input ends. A template is a program, and a
``tokenizer.json`` may be large or hostile; here neither can hold up the server's interpreter lock, memory or threads.
``text_process`` is the other end.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.text.chat_template import ChatMessage, check_template, render_chat

LENGTH_BYTES = 8
MAX_RENDERED_LENGTH = 4 * 1024 * 1024
"""Characters that a template may write."""
RENDER_CPU_S = 2.0
"""How much processor time a template may take for a conversation."""
MOMENT_S = 0.25
"""How much of it all but slow templates need."""
TIME_IS_UP = signal.SIGPROF
"""The signal that ends this process when a request has used up its time."""
IS_LAST = "is_last"
"""Key of an answer after which this process takes no more requests: it has grown too large."""

_READ_CPU_S = 60.0
_RENDER_MEMORY_BYTES = 1024 * 1024 * 1024
_READ_MEMORY_BYTES = 16 * 1024 * 1024 * 1024
# Compiled templates stay in memory, with the constants folded into them, and would leave others less than their bound.
_KEPT_MEMORY_BYTES = 256 * 1024 * 1024


def main() -> None:
    """Answer requests; an answer is a JSON object, with ``error`` if something was refused.

    A request that takes too much time or memory ends the process.
    """
    # Ctrl-C at the server's terminal is for the server to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(TIME_IS_UP, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write between answers
    most_bytes = _address_space_bytes() + _KEPT_MEMORY_BYTES
    while length := source.read(LENGTH_BYTES):
        request: dict[str, Any] = pickle.loads(source.read(int.from_bytes(length, "big")))
        answer = _ACTIONS[request.pop("action")](**request)
        _answer(target, {**answer, IS_LAST: _address_space_bytes() > most_bytes})


def _answer(target: BinaryIO, answer: Mapping[str, object]) -> None:
    content = json.dumps(answer).encode()
    target.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    target.flush()


def _render(
    template: str, messages: Sequence[ChatMessage], special_tokens: Mapping[str, str], cpu_s: float
) -> dict[str, object]:
    with _bounded(cpu_s, _RENDER_MEMORY_BYTES):
        try:
            text = render_chat(template, messages, special_tokens)
        except FieldInvalidError as error:
            _end_without_memory(error)
            return {"error": error.description}
    if len(text) > MAX_RENDERED_LENGTH:
        return {"error": f"the chat template writes more than {MAX_RENDERED_LENGTH} characters"}
    return {"text": text}


def _compile(template: str) -> dict[str, object]:
    with _bounded(RENDER_CPU_S, _RENDER_MEMORY_BYTES):
        try:
            check_template(template)
        except ValueError as error:
            _end_without_memory(error)
            return {"error": str(error)}
    return {}


def _read(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, object]:
    from manyhats.engine.text.tokenizer_comparison import compare_with_base

    with _bounded(_READ_CPU_S, _READ_MEMORY_BYTES):
        try:
            return compare_with_base(files, base)
        except ModelError as error:
            _end_without_memory(error)
            return {"error": str(error)}


_ACTIONS: Mapping[str, Callable[..., dict[str, object]]] = {
    "render": _render,
    "compile": _compile,
    "read": _read,
}


def _end_without_memory(error: Exception) -> None:
    """End the process if it has no memory left: earlier requests may have taken it, so a fresh one should try again."""
    if isinstance(error.__cause__, MemoryError):
        raise error.__cause__


def _address_space_bytes() -> int:
    """What counts against the memory bound; 0 if the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[0]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


@contextmanager
def _bounded(cpu_s: float, memory_bytes: int) -> Iterator[None]:
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


if __name__ == "__main__":
    main()
