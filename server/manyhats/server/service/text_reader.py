"""Callers' texts → tokens → what the engine reads in them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.request import EncodeRequest
from manyhats.server.access.rules import check_priority
from manyhats.server.service.prompts import Prompt, TextPrompt, check_num_inputs
from manyhats.server.service.tasks import Tasks, task_id

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.adapters.heads import Pooling
    from manyhats.engine.output import EncodeOutput
    from manyhats.engine.text.tokenizer import ReadText
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call


class TextReader:
    """Tokenizes texts as their task does, and has the engine read them.

    Args:
        backend: its engine and store.
        tasks: tokenizers.
        metrics: counts.
    """

    def __init__(self, backend: Backend, tasks: Tasks, metrics: Metrics) -> None:
        self._backend = backend
        self._tasks = tasks
        self._metrics = metrics

    async def check_fits(self, adapter: AdapterRecord, text: TextPrompt) -> None:
        """Raise ``PromptTooLongError`` if a text alone is longer than the context; it is called by its own field."""
        tokenizer = await self._tasks.tokenizer_of(adapter)
        try:
            await self._tasks.encoder(tokenizer, self._backend.engine.max_context_length).read(text)
        except PromptTooLongError as error:
            error.renamed(text.field)
            raise

    async def read(
        self,
        call: Call,
        adapter: AdapterRecord | None,
        inputs: Sequence[Prompt],
        field: str = "inputs",
        *,
        truncates: bool,
        request_id: str = "",
        pooling: Pooling | None = None,
        applies_head: bool = True,
        cache_salt: str = "",
        priority: int = 0,
    ) -> tuple[tuple[int, ...], EncodeOutput]:
        """How many tokens each text has, and what is read in them.

        Args:
            call: whose texts they are.
            adapter: to read them with; None for the base.
            inputs: the texts.
            field: what errors call them.
            truncates: whether texts that are too long are cut at their ends.
            request_id: the call's if empty.
            pooling, applies_head, cache_salt, priority: as of ``EncodeRequest``.

        Raises:
            PromptTooLongError, FieldInvalidError: a text cannot be read.
            EngineError, AdapterError: it cannot be served.
        """
        limit = self._backend.engine.max_context_length
        kind = "read" if applies_head else "embed"
        while True:
            tokens = await self._tokens(adapter, inputs, field, truncates, limit)
            request = EncodeRequest(
                id=request_id or call.id,
                inputs=tuple(each.token_ids for each in tokens),
                token_types=_types(tokens),
                pooling=pooling,
                applies_head=applies_head,
                adapter=adapter,
                priority=check_priority(priority, call.caller),
                deadline_s=call.deadline_s,
                cache_salt=cache_salt,
                accepted_s=call.received_s,
            )
            call.work.queued(kind, self._backend.info.name)
            try:
                output = await self._backend.engine.encode(request)
            except PromptTooLongError as error:
                error.renamed(error.field.replace("inputs", field, 1))
                if not truncates or error.limit >= limit:
                    raise
                limit = error.limit  # of the context, as much as the adapter's virtual tokens leave
            else:
                self._metrics.encoded(task_id(adapter), output.usage)
                call.work.ended(output.usage)
                return tuple(len(each.token_ids) for each in tokens), output

    async def _tokens(
        self,
        adapter: AdapterRecord | None,
        inputs: Sequence[Prompt],
        field: str,
        truncates: bool,
        limit: int,
    ) -> tuple[ReadText, ...]:
        check_num_inputs(len(inputs), field)
        encoder = self._tasks.encoder(await self._tasks.tokenizer_of(adapter), limit, adapter)
        found = []
        for index, each in enumerate(inputs):
            with _named(f"{field}[{index}]"):
                found.append(await encoder.read(each, truncates=truncates))
            # Short texts are tokenized here: others get a turn after each.
            await asyncio.sleep(0)
        return tuple(found)


def _types(tokens: Sequence[ReadText]) -> tuple[tuple[int, ...], ...]:
    """Types of all tokens; empty if all are 0."""
    if not any(each.token_types for each in tokens):
        return ()
    return tuple(each.token_types or (0,) * len(each.token_ids) for each in tokens)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the text that is too long, or the conversation at fault; other texts have names of their own."""
    try:
        yield
    except PromptTooLongError as error:
        error.renamed(name)
        raise
    except FieldInvalidError as error:
        if error.field.partition(".")[0] == "chat":
            error.renamed(f"{name}.{error.field}")
        raise
