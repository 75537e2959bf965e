"""The tokenizers of tasks that read and write text differently from the base."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterError
from manyhats.engine.threads.awaiting import outlived

if TYPE_CHECKING:
    from manyhats.engine.text.chat_template import Rendering
    from manyhats.engine.text.task_text import TaskTexts
    from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer

T = TypeVar("T")

_MAX_KEPT = 256
_SLOW_FOR_S = 600.0

ReadText = Callable[[AdapterRecord], Sequence[Mapping[str, bytes | bytearray]]]
"""A version's text files: one mapping for each part that has any. Blocks on the store."""


class TaskTokenizers:
    """Finds a version's tokenizer, and renders conversations by its template. Belongs to the event loop.

    Tasks whose files mean the same share one tokenizer; recently used ones are kept.

    A template that does not finish within a moment is retried among the slow ones, one at a time, and stays there for
    ten minutes: it delays nobody else by more than that moment.

    Args:
        texts: the base's.
        read_text: reads a version's files.
        reading: threads for that, which block; None for the event loop's own.
        rendering: threads for templates; each waits for a process.
        slow: a thread for templates that take long.
    """

    def __init__(
        self,
        texts: TaskTexts,
        read_text: ReadText,
        *,
        reading: Executor | None = None,
        rendering: Executor | None = None,
        slow: Executor | None = None,
    ) -> None:
        self._texts = texts
        self._read_text = read_text
        self._reading = reading
        self._rendering = rendering
        self._slow = slow
        self._kept: OrderedDict[str, asyncio.Future[Tokenizer]] = OrderedDict()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slow_until_s: dict[str, float] = {}

    async def of(self, record: AdapterRecord | None) -> Tokenizer | None:
        """The tokenizer of a version; None if it is the base's.

        Raises:
            AdapterError: its files are gone, damaged, or cannot be used on this base.
        """
        if record is None or not record.text:
            return None
        while (kept := self._of_others(record.text)) is not None:
            try:
                return await outlived(kept)
            except AdapterError:
                continue  # another version's files, which may be gone while this one's are not
        found = asyncio.ensure_future(_run(self._reading, lambda: self._read(record)))
        self._kept[record.text] = found
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        # A caller who leaves does not end the reading for the others.
        return await outlived(found)

    async def render(
        self, tokenizer: Tokenizer, messages: Sequence[ChatMessage], rendering: Rendering
    ) -> str:
        """The prompt of a conversation by a task's own template, which is an untrusted program.

        Raises:
            FieldInvalidError: as ``render_chat``; or the template takes too much time or memory.
        """
        # One at a time for each tokenizer.
        turn = self._turns.setdefault(tokenizer.fingerprint, asyncio.Lock())
        async with turn:
            if self._slow_until_s.get(tokenizer.fingerprint, 0.0) <= time.monotonic():
                text = await _run(
                    self._rendering, lambda: self._render_in_a_moment(tokenizer, messages, rendering)
                )
                if text is not None:
                    return text
            return await _run(
                self._slow,
                lambda: self._texts.processes.render(
                    tokenizer.chat_template or "", messages, tokenizer.special_tokens, rendering
                ),
            )

    def _of_others(self, text: str) -> asyncio.Future[Tokenizer] | None:
        """What has been read, or is being read, for files that mean the same."""
        kept = self._kept.get(text)
        if kept is None or (kept.done() and (kept.cancelled() or kept.exception() is not None)):
            self._kept.pop(text, None)
            return None
        self._kept.move_to_end(text)
        return kept

    def _read(self, record: AdapterRecord) -> Tokenizer:
        for files in self._read_text(record):
            text = self._texts.read(files)
            if text.facts.fingerprint:
                return text.tokenizer
        return self._texts.base

    def _render_in_a_moment(
        self, tokenizer: Tokenizer, messages: Sequence[ChatMessage], rendering: Rendering
    ) -> str | None:
        text = self._texts.processes.render_in_a_moment(
            tokenizer.chat_template or "", messages, tokenizer.special_tokens, rendering
        )
        if text is None:
            # Noted here, on the thread: the caller may have left.
            now_s = time.monotonic()
            for fingerprint, until_s in list(self._slow_until_s.items()):
                if until_s <= now_s:
                    self._slow_until_s.pop(fingerprint, None)
            self._slow_until_s[tokenizer.fingerprint] = now_s + _SLOW_FOR_S
        return text


async def _run(threads: Executor | None, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
