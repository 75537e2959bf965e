"""Reads texts for callers, whatever the transport: vectors, classes of texts and of tokens, relevance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.reserved_labels import class_names, read_pooling
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.service.class_scores import activated, num_scores, scored_rows, sigmoid
from manyhats.server.service.entities import Aggregation, Entity, entities
from manyhats.server.service.merging import each_of
from manyhats.server.service.prompts import Prompt, TextPrompt
from manyhats.server.service.readings import (
    Classifications,
    Embeddings,
    Ranked,
    Tagged,
    TaggedToken,
    Vector,
)
from manyhats.server.service.tasks import Tasks, check_kind
from manyhats.server.service.text_reader import TextReader
from manyhats.server.service.text_threads import ENTRY_WEIGHT, paced

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.output import EncodeOutput
    from manyhats.engine.text.tokenizer import Tokenizer, TokenSpan
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call

MAX_TASKS = 16
"""How many tasks one call puts its texts to."""
MAX_TOKEN_SCORES = 1024 * 1024
"""How many labels of tokens one answer tells."""

# How many of a vector's values take the time of a character to tokenize.
_VALUES_PER_CHARACTER = 16

T = TypeVar("T")


class Encodings:
    """Reads callers' texts with the adapter that their call names.

    Args:
        backend: its engine and store.
        metrics: counts.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._tasks = Tasks(backend)
        self._reader = TextReader(backend, self._tasks, metrics)

    async def embed(
        self,
        call: Call,
        inputs: Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int = 0,
        truncates: bool = False,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Embeddings:
        """A vector of each text, by any task but a classifier, or by that too if the call names the pooling.

        Args:
            call: names the task.
            inputs: the texts.
            pooling: of hidden values; None for the task's, or else the base's. ``ALL`` is refused.
            normalize: whether vectors have length 1.
            dimensions: how many of each vector's first values, before they are normalized; 0 for all.
            truncates: whether texts that are too long are cut at their ends.
            cache_salt, priority: as for a generation.

        Raises:
            TaskKindError: the task is a classifier, and no pooling is named.
            FieldInvalidError: a field is out of range, or a text cannot be read.
            EngineError, AdapterError: it cannot be served.
        """
        adapter = self._tasks.resolved(call)
        if pooling is None:
            kinds, own = (TaskKind.GENERATE, TaskKind.EMBED), self._backend.info.kind
            check_kind(adapter, *kinds, act="embed unless a pooling is named", base=own)
            pooling = None if adapter is None else read_pooling(adapter.labels)
        if pooling is Pooling.ALL:
            raise FieldInvalidError("pooling", "must give one vector a text")
        size = self._backend.info.embedding_size
        if not 0 <= dimensions <= size:
            raise FieldInvalidError("dimensions", f"must be in [0, {size}], not {dimensions}")
        num_tokens, output = await self._reader.read(
            call,
            adapter,
            inputs,
            truncates=truncates,
            pooling=pooling,
            applies_head=False,
            cache_salt=cache_salt,
            priority=priority,
        )
        vectors = await self._backend.text_threads.run(
            partial(_vectors, output, dimensions or size, normalize),
            size * len(inputs) // _VALUES_PER_CHARACTER,
        )
        return Embeddings(vectors, num_tokens, output.usage, adapter)

    async def classify(
        self,
        call: Call,
        inputs: Sequence[Prompt],
        *,
        raw_scores: bool = False,
        top_k: int = 0,
        truncates: bool = False,
        priority: int = 0,
    ) -> Classifications:
        """The labels of each text by the task's head.

        Args:
            call: names the task.
            inputs: the texts.
            raw_scores: whether scores are the logits.
            top_k: how many labels of each, best first; 0 for all.
            truncates: whether texts that are too long are cut at their ends.
            priority: as for a generation.

        Raises:
            TaskKindError: the task has no head for texts.
            FieldInvalidError: a text cannot be read.
            EngineError, AdapterError: it cannot be served.
        """
        _check_most("top_k", top_k)
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY)
        return await self._classified(call, call.id, adapter, inputs, raw_scores, top_k, truncates, priority)

    async def classify_by_each(
        self,
        call: Call,
        task_ids: Sequence[str],
        inputs: Sequence[Prompt],
        *,
        raw_scores: bool = False,
        top_k: int = 0,
        truncates: bool = False,
        priority: int = 0,
    ) -> tuple[Classifications, ...]:
        """The labels of each text by the head of each task; the tasks run together.

        Args:
            call: it may use them all.
            task_ids: their names, or their versions'.
            inputs, raw_scores, top_k, truncates, priority: as for ``classify``.

        Raises:
            TaskKindError: one of the tasks has no head for texts.
            FieldInvalidError: there are too many tasks, or none; or as for ``classify``.
            EngineError, AdapterError: likewise.
        """
        _check_most("top_k", top_k)
        if not 1 <= len(task_ids) <= MAX_TASKS:
            raise FieldInvalidError("task_ids", f"must have 1 to {MAX_TASKS}, not {len(task_ids)}")
        adapters = [self._of_kind(self._tasks.version(name), TaskKind.CLASSIFY) for name in task_ids]

        async def one(index: int) -> Classifications:
            return await self._classified(
                call, f"{call.id}-{index}", adapters[index], inputs, raw_scores, top_k, truncates, priority
            )

        return tuple(await each_of(one, len(adapters), at_once=len(adapters)))

    async def classify_tokens(
        self,
        call: Call,
        inputs: Sequence[TextPrompt],
        *,
        top_k: int = 0,
        truncates: bool = False,
        priority: int = 0,
    ) -> Tagged[TaggedToken]:
        """The labels of each text's tokens by the task's head; arguments as for ``classify``.

        Raises:
            TaskKindError: the task has no head for tokens.
            FieldInvalidError: a text cannot be read; or there would be too many scores.
            EngineError, AdapterError: it cannot be served.
        """
        _check_most("top_k", top_k)
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY_TOKENS, "classify tokens")

        def tagged(text: str, spans: Sequence[TokenSpan], logits: Vector) -> tuple[TaggedToken, ...]:
            rows = scored_rows(adapter, logits, False, top_k)
            return tuple(
                TaggedToken(index, span.start, span.end, scored)
                for index, (span, scored) in enumerate(zip(spans, rows, strict=True))
                if span.end > span.start
            )

        return await self._found(call, adapter, inputs, tagged, top_k, truncates, priority)

    async def entities(
        self,
        call: Call,
        inputs: Sequence[TextPrompt],
        aggregation: Aggregation,
        *,
        truncates: bool = False,
        priority: int = 0,
    ) -> Tagged[Entity]:
        """The entities that the labels of each text's tokens make; otherwise as ``classify_tokens``."""
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY_TOKENS, "classify tokens")

        def found(text: str, spans: Sequence[TokenSpan], logits: Vector) -> tuple[Entity, ...]:
            names = class_names(adapter.labels, logits.shape[1])
            scores = activated(logits.astype(np.float64), adapter)
            return tuple(entities(text, spans, scores, names, aggregation))

        return await self._found(call, adapter, inputs, found, 1, truncates, priority)

    async def rerank(
        self,
        call: Call,
        query: str,
        texts: Sequence[str],
        *,
        raw_scores: bool = False,
        top_n: int = 0,
        truncates: bool = False,
        priority: int = 0,
    ) -> Ranked:
        """How relevant texts are to a query, by a head with one label: the tokenizer's pair of query and text is read.

        Args:
            call: names the task.
            query: what is asked.
            texts: what may answer it.
            raw_scores: whether scores are logits, rather than their sigmoid.
            top_n: how many of the best; 0 for all.
            truncates: whether pairs that are too long are cut; a query that is too long by itself is refused.
            priority: as for a generation.

        Raises:
            TaskKindError: the task has no head for texts.
            FieldInvalidError: its head has several labels, or a text cannot be read.
            EngineError, AdapterError: it cannot be served.
        """
        _check_most("top_n", top_n)
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY, "rank texts")
        asked = TextPrompt(query, field="query")
        pairs = [TextPrompt(text, field=f"texts[{index}]", first=query) for index, text in enumerate(texts)]
        if truncates:  # the query is tokenized with each text, so that its own length must be bounded
            await self._reader.check_fits(adapter, asked)
        num_tokens, output = await self._reader.read(
            call, adapter, pairs, "texts", truncates=truncates, priority=priority
        )
        num_classes = output.values[0].shape[1]
        if num_classes != 1:
            raise FieldInvalidError(
                "task_id", f"{adapter.name} has {num_classes} classes; relevance needs a head with one"
            )
        logits = [float(values[0, 0]) for values in output.values]
        scores = logits if raw_scores else sigmoid(np.array(logits)).tolist()
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        best = tuple((index, scores[index]) for index in order[: top_n or None])
        return Ranked(best, num_tokens, output.usage, adapter)

    def _of_kind(
        self, adapter: AdapterRecord | None, kind: TaskKind, act: str = "classify texts"
    ) -> AdapterRecord:
        check_kind(adapter, kind, act=act, base=self._backend.info.kind)
        assert adapter is not None  # the base model has no head
        return adapter

    async def _classified(
        self,
        call: Call,
        request_id: str,
        adapter: AdapterRecord,
        inputs: Sequence[Prompt],
        raw_scores: bool,
        top_k: int,
        truncates: bool,
        priority: int,
    ) -> Classifications:
        num_tokens, output = await self._reader.read(
            call, adapter, inputs, truncates=truncates, request_id=request_id, priority=priority
        )
        logits = np.concatenate(output.values)
        results = await self._backend.text_threads.build(
            partial(scored_rows, adapter, logits, raw_scores, top_k), num_scores(output, top_k)
        )
        return Classifications(results, num_tokens, output.usage, adapter)

    async def _found(
        self,
        call: Call,
        adapter: AdapterRecord,
        inputs: Sequence[TextPrompt],
        find: Callable[[str, list[TokenSpan], Vector], tuple[T, ...]],
        top_k: int,
        truncates: bool,
        priority: int,
    ) -> Tagged[T]:
        """What ``find`` finds by the logits of each text's tokens."""
        tokenizer = await self._tasks.tokenizer_of(adapter) or self._backend.tokenizer
        num_tokens, output = await self._reader.read(
            call, adapter, inputs, truncates=truncates, priority=priority
        )
        count = num_scores(output, top_k)
        if count > MAX_TOKEN_SCORES:
            raise FieldInvalidError(
                "top_k", f"leaves {count} scores of all tokens together; the limit is {MAX_TOKEN_SCORES}"
            )

        def work() -> tuple[tuple[T, ...], ...]:
            texts = paced(
                zip(inputs, num_tokens, output.values, strict=True), lambda each: ENTRY_WEIGHT * len(each[2])
            )
            return tuple(
                find(each.text, _spans(tokenizer, each, count), values) for each, count, values in texts
            )

        results = await self._backend.text_threads.build(work, count)
        return Tagged(results, num_tokens, output.usage, adapter)


def _check_most(field: str, count: int) -> None:
    if count < 0:
        raise FieldInvalidError(field, f"must be 0 (all) or more, not {count}")


def _spans(tokenizer: Tokenizer, text: TextPrompt, num_tokens: int) -> list[TokenSpan]:
    return tokenizer.spans(text.text, add_special_tokens=text.add_special_tokens, max_tokens=num_tokens)


def _vectors(output: EncodeOutput, size: int, normalize: bool) -> tuple[Vector, ...]:
    pooled = paced(output.values, lambda values: values.shape[1] // _VALUES_PER_CHARACTER)
    return tuple(_vector(values[0], size, normalize) for values in pooled)


def _vector(values: Vector, size: int, normalize: bool) -> Vector:
    cut = values[:size].astype(np.float64)
    length = math.sqrt(float(cut @ cut))
    return (cut / length if normalize and length else cut).astype(np.float32)
