"""The program in which untrusted templates and tokenizers run: a separate process, with bounds.

It reads requests from its input and answers each on its output, until the input ends. A template is a program, and a
``tokenizer.json`` may be large or hostile; here neither can hold up the server's interpreter lock, memory or threads.
``text_process`` is the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.text.chat_template import ChatMessage, Rendering, check_template, render_chat
from manyhats.engine.threads.programs import answer_requests, bounded, prepare_program

MAX_RENDERED_LENGTH = 4 * 1024 * 1024
"""Characters that a template may write."""
RENDER_CPU_S = 2.0
"""How much processor time a template may take for a conversation."""
MOMENT_S = 0.25
"""How much of it all but slow templates need."""

_READ_CPU_S = 60.0
_RENDER_MEMORY_BYTES = 1024 * 1024 * 1024
_READ_MEMORY_BYTES = 16 * 1024 * 1024 * 1024
# Compiled templates stay in memory, with the constants folded into them, and would leave others less than their bound.
_KEPT_MEMORY_BYTES = 256 * 1024 * 1024


def main() -> None:
    """Answer requests; an answer is a JSON object, with ``error`` if something was refused.

    A request that takes too much time or memory ends the process.
    """
    prepare_program()
    answer_requests(
        lambda request: _ACTIONS[request.pop("action")](**request), kept_memory_bytes=_KEPT_MEMORY_BYTES
    )


def _render(
    template: str,
    messages: Sequence[ChatMessage],
    special_tokens: Mapping[str, str],
    rendering: Rendering,
    cpu_s: float,
) -> dict[str, object]:
    with bounded(cpu_s, _RENDER_MEMORY_BYTES):
        try:
            text = render_chat(template, messages, special_tokens, rendering)
        except FieldInvalidError as error:
            _end_without_memory(error)
            return {"field": error.field, "error": error.description}
    if len(text) > MAX_RENDERED_LENGTH:
        return {
            "field": "chat",
            "error": f"the chat template writes more than {MAX_RENDERED_LENGTH} characters",
        }
    return {"text": text}


def _compile(template: str) -> dict[str, object]:
    with bounded(RENDER_CPU_S, _RENDER_MEMORY_BYTES):
        try:
            check_template(template)
        except ValueError as error:
            _end_without_memory(error)
            return {"error": str(error)}
    return {}


def _read(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, object]:
    from manyhats.engine.text.tokenizer_comparison import compare_with_base

    with bounded(_READ_CPU_S, _READ_MEMORY_BYTES):
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


if __name__ == "__main__":
    main()
