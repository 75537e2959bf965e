"""Processes for untrusted texts: templates and tokenizers that came with an adapter.

See ``text_program``, which runs in them.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.text.chat_template import ChatMessage
from manyhats.engine.text.text_program import IS_LAST, LENGTH_BYTES, MOMENT_S, RENDER_CPU_S, TIME_IS_UP

# None of this process's credentials: what runs there is untrusted.
_HANDED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "TZ")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# Processor time has its own bounds; these are for a process that waits, or a machine that is busy.
_BRIEF_S = 20.0
_LONG_S = 180.0


class TextProcesses:
    """Processes that take requests in turn, started as needed. Thread-safe.

    No request suffers from what others left in a process: if one dies on a request, other than by its time limit, a
    fresh one replaces it and repeats the request.

    Args:
        count: how many are kept for the next request, and how many examine files at a time.
    """

    def __init__(self, count: int = 2) -> None:
        self._count = count
        self._reading = threading.BoundedSemaphore(count)
        self._idle: list[_TextProcess] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._idle)

    def render(
        self, template: str, messages: Sequence[ChatMessage], special_tokens: Mapping[str, str]
    ) -> str:
        """``render_chat``, within bounds.

        Raises:
            FieldInvalidError: ``chat``: the template refuses the messages, or exceeds a bound.
        """
        try:
            return self._render(template, messages, special_tokens, RENDER_CPU_S)
        except _EndedError:
            raise FieldInvalidError("chat", "the chat template takes too much time or memory") from None

    def render_in_a_moment(
        self, template: str, messages: Sequence[ChatMessage], special_tokens: Mapping[str, str]
    ) -> str | None:
        """``render``, but None for a template that takes longer than ``MOMENT_S``, or too much memory.

        Raises:
            FieldInvalidError: as ``render``.
        """
        try:
            return self._render(template, messages, special_tokens, MOMENT_S)
        except _EndedError:
            return None

    def compile_error(self, template: str) -> str:
        """What is wrong with a template's syntax; empty if nothing."""
        try:
            with self._reading:
                return str(self._ask("compile", {"template": template}, _BRIEF_S).get("error", ""))
        except _EndedError:
            return "takes too much time or memory to compile"

    def compare(self, files: Mapping[str, bytes], base: Mapping[str, bytes]) -> Mapping[str, Any]:
        """``compare_with_base``, within bounds.

        Raises:
            ModelError: a file cannot be read; the message begins with its name.
        """
        try:
            with self._reading:
                answer = self._ask("read", {"files": dict(files), "base": dict(base)}, _LONG_S)
        except _EndedError:
            raise ModelError("/tokenizer.json: takes too much time or memory to read") from None
        if "error" in answer:
            raise ModelError(answer["error"])
        return answer

    def close(self) -> None:
        """End the idle processes; busy ones end with their work."""
        with self._lock:
            _end_all(self._idle)

    def _render(
        self,
        template: str,
        messages: Sequence[ChatMessage],
        special_tokens: Mapping[str, str],
        cpu_s: float,
    ) -> str:
        request = {
            "template": template,
            "messages": tuple(messages),
            "special_tokens": dict(special_tokens),
            "cpu_s": cpu_s,
        }
        answer = self._ask("render", request, _BRIEF_S)
        if "error" in answer:
            raise FieldInvalidError("chat", answer["error"])
        text: str = answer["text"]
        return text

    def _ask(self, action: str, request: Mapping[str, object], patience_s: float) -> dict[str, Any]:
        content = pickle.dumps({"action": action, **request})
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is not None:
            try:
                return self._ask_one(process, content, patience_s)
            except _TooSlowError:
                raise
            except _EndedError:
                pass  # it may have died while idle, or from what earlier requests left in it
        return self._ask_one(_TextProcess(), content, patience_s)

    def _ask_one(self, process: _TextProcess, content: bytes, patience_s: float) -> dict[str, Any]:
        try:
            answer = process.ask(content, patience_s)
        except BaseException:
            process.end()
            raise
        with self._lock:
            if not answer.pop(IS_LAST, False) and len(self._idle) < self._count:
                self._idle.append(process)
                return answer
        process.end()
        return answer


def _end_all(processes: list[_TextProcess]) -> None:
    while processes:
        processes.pop().end()


class _EndedError(Exception):
    """The process ended on a request."""


class _TooSlowError(_EndedError):
    """The request took too much processor time, or too long."""


class _TextProcess:
    """One process, which answers one request at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "manyhats.engine.text.text_program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _HANDED_ON if name in os.environ} | _ENVIRONMENT,
            start_new_session=True,
        )

    def ask(self, content: bytes, patience_s: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            _EndedError: there is none.
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
            self._process.stdin.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
            self._process.stdin.flush()
            length = int.from_bytes(_read(self._process.stdout, LENGTH_BYTES), "big")
            answer: dict[str, Any] = json.loads(_read(self._process.stdout, length))
        except (OSError, ValueError) as error:
            self._process.kill()
            if is_late.is_set() or self._process.wait() == -TIME_IS_UP:
                raise _TooSlowError from error
            raise _EndedError from error
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
