"""The program in which strangers' templates and tokenizers are run: a process of its own, with bounds.

It reads requests from its input and answers each on its output, until the input ends. A template is a program, and a
``tokenizer.json`` may be large or hostile; here neither holds the server's interpreter lock, memory or threads.
``text_process`` is the other end.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from manyhats.engine.errors import FieldInvalidError, ModelError

LENGTH_BYTES = 8
MAX_RENDERED_LENGTH = 4 * 1024 * 1024
"""Characters that a template may write."""

_RENDER_CPU_S = 2
_READ_CPU_S = 60
_RENDER_MEMORY_BYTES = 1024 * 1024 * 1024
_READ_MEMORY_BYTES = 16 * 1024 * 1024 * 1024


def main() -> None:
    """Answer requests; an answer is a JSON object, which has ``error`` where something was refused."""
    # What ends the server at a terminal is for the server to hand on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write between answers
    while length := source.read(LENGTH_BYTES):
        request: dict[str, Any] = pickle.loads(source.read(int.from_bytes(length, "big")))
        _answer(target, _ACTIONS[request.pop("action")](**request))


def _answer(target: BinaryIO, answer: Mapping[str, object]) -> None:
    content = json.dumps(answer).encode()
    target.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    target.flush()


def _render(template: str, messages: Sequence[Any], special_tokens: Mapping[str, str]) -> dict[str, object]:
    from manyhats.engine.chat_template import render_chat

    _bound(_RENDER_CPU_S, _RENDER_MEMORY_BYTES)
    try:
        text = render_chat(template, messages, special_tokens)
    except FieldInvalidError as error:
        return {"error": error.description}
    if len(text) > MAX_RENDERED_LENGTH:
        return {"error": f"the chat template writes over {MAX_RENDERED_LENGTH} characters"}
    return {"text": text}


def _compile(template: str) -> dict[str, object]:
    from manyhats.engine.chat_template import check_template

    _bound(_RENDER_CPU_S, _RENDER_MEMORY_BYTES)
    try:
        check_template(template)
    except ValueError as error:
        return {"error": str(error)}
    return {}


def _read(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, object]:
    from manyhats.engine.tokenizer_comparison import compare_with_base

    _bound(_READ_CPU_S, _READ_MEMORY_BYTES)
    try:
        return compare_with_base(files, base)
    except ModelError as error:
        return {"error": str(error)}


_ACTIONS: Mapping[str, Callable[..., dict[str, object]]] = {
    "render": _render,
    "compile": _compile,
    "read": _read,
}


def _bound(cpu_s: int, memory_bytes: int) -> None:
    """Let this process take so much more processor time, and so much memory in all; beyond the first it is killed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + cpu_s, most))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


if __name__ == "__main__":
    main()
