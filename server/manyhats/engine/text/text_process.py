"""Processes for untrusted texts: templates and tokenizers that came with an adapter.

See ``text_program``, which runs in them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.text.chat_template import ChatMessage, Rendering
from manyhats.engine.text.text_program import MOMENT_S, RENDER_CPU_S
from manyhats.engine.threads.programs import EndedError, Programs

# Processor time has its own bounds; these are for a process that waits, or a machine that is busy.
_BRIEF_S = 20.0
_LONG_S = 180.0
_AS_PROMPT = Rendering()


class TextProcesses:
    """``text_program``'s processes; thread-safe.

    Args:
        count: how many are kept for the next request, and how many examine files at a time.
    """

    def __init__(self, count: int = 2) -> None:
        self._programs = Programs("manyhats.engine.text.text_program", count)
        self._reading = threading.BoundedSemaphore(count)

    def render(
        self,
        template: str,
        messages: Sequence[ChatMessage],
        special_tokens: Mapping[str, str],
        rendering: Rendering = _AS_PROMPT,
    ) -> str:
        """``render_chat``, within bounds.

        Raises:
            FieldInvalidError: as ``render_chat``; or the template exceeds a bound.
        """
        try:
            return self._render(template, messages, special_tokens, rendering, RENDER_CPU_S)
        except EndedError:
            raise FieldInvalidError("chat", "the chat template takes too much time or memory") from None

    def render_in_a_moment(
        self,
        template: str,
        messages: Sequence[ChatMessage],
        special_tokens: Mapping[str, str],
        rendering: Rendering = _AS_PROMPT,
    ) -> str | None:
        """``render``, but None for a template that takes longer than ``MOMENT_S``, or too much memory.

        Raises:
            FieldInvalidError: as ``render``.
        """
        try:
            return self._render(template, messages, special_tokens, rendering, MOMENT_S)
        except EndedError:
            return None

    def compile_error(self, template: str) -> str:
        """What is wrong with a template's syntax; empty if nothing."""
        try:
            with self._reading:
                return str(
                    self._programs.ask({"action": "compile", "template": template}, _BRIEF_S).get("error", "")
                )
        except EndedError:
            return "takes too much time or memory to compile"

    def compare(self, files: Mapping[str, bytes], base: Mapping[str, bytes]) -> Mapping[str, Any]:
        """``compare_with_base``, within bounds.

        Raises:
            ModelError: a file cannot be read; the message begins with its name.
        """
        try:
            with self._reading:
                answer = self._programs.ask(
                    {"action": "read", "files": dict(files), "base": dict(base)}, _LONG_S
                )
        except EndedError:
            raise ModelError("/tokenizer.json: takes too much time or memory to read") from None
        if "error" in answer:
            raise ModelError(answer["error"])
        return answer

    def close(self) -> None:
        """End the idle processes; busy ones end with their work."""
        self._programs.close()

    def _render(
        self,
        template: str,
        messages: Sequence[ChatMessage],
        special_tokens: Mapping[str, str],
        rendering: Rendering,
        cpu_s: float,
    ) -> str:
        request = {
            "action": "render",
            "template": template,
            "messages": tuple(messages),
            "special_tokens": dict(special_tokens),
            "rendering": rendering,
            "cpu_s": cpu_s,
        }
        answer = self._programs.ask(request, _BRIEF_S)
        if "error" in answer:
            raise FieldInvalidError(answer["field"], answer["error"])
        text: str = answer["text"]
        return text
