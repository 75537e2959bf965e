"""The tokenizers of tasks that read and write text otherwise than the base does."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TypeVar
from weakref import WeakValueDictionary

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.task_text import TaskTexts
from manyhats.engine.tokenizer import ChatMessage, Tokenizer

T = TypeVar("T")

_MAX_KEPT = 256

ReadText = Callable[[AdapterRecord], Sequence[Mapping[str, bytes | bytearray]]]
"""A version's text files: one mapping for each part that has any. Blocks on the store."""


class TaskTokenizers:
    """Finds a version's tokenizer, and renders conversations by its template. Belongs to the event loop.

    Tokenizers of tasks that mean the same by their files are one object; those used lately are kept.

    Args:
        texts: of the base.
        read_text: reads a version's files.
        threads: for reading and rendering, which block.
    """

    def __init__(self, texts: TaskTexts, read_text: ReadText, threads: Executor | None = None) -> None:
        self._texts = texts
        self._read_text = read_text
        self._threads = threads
        self._kept: OrderedDict[str, asyncio.Future[Tokenizer]] = OrderedDict()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def of(self, record: AdapterRecord | None) -> Tokenizer | None:
        """The tokenizer of a version; None if it is the base's.

        Raises:
            AdapterError: its files are gone, damaged, or cannot be used on this base.
        """
        if record is None or not record.text:
            return None
        found = self._kept.get(record.text)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = asyncio.ensure_future(self._run(lambda: self._read(record)))
            self._kept[record.text] = found
        self._kept.move_to_end(record.text)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        # One caller who leaves does not end the reading for the others.
        return await asyncio.shield(found)

    async def render(self, tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> str:
        """The prompt of a conversation by a task's own template, which is a stranger's program.

        Raises:
            FieldInvalidError: ``chat``: the template refuses the messages, or takes too much time or memory.
        """
        template = tokenizer.chat_template or ""
        # One at a time of each tokenizer: a slow template keeps others from no more than one process.
        turn = self._turns.setdefault(tokenizer.fingerprint, asyncio.Lock())
        async with turn:
            return await self._run(
                lambda: self._texts.processes.render(template, messages, tokenizer.special_tokens)
            )

    def _read(self, record: AdapterRecord) -> Tokenizer:
        for files in self._read_text(record):
            text = self._texts.read(files)
            if text.facts.fingerprint:
                return text.tokenizer
        return self._texts.base

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
