"""Reads texts for callers, whatever the transport: vectors, classes of texts and of tokens, relevance."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.reserved_labels import class_names, read_pooling
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.output import Usage
from manyhats.engine.request import EncodeRequest
from manyhats.server.service.class_scores import Scored, activated, num_scores, scored_rows, sigmoid
from manyhats.server.service.entities import Aggregation, Entity, entities
from manyhats.server.service.merging import each_of
from manyhats.server.service.prompts import Prompt, TextPrompt, check_num_inputs
from manyhats.server.service.tasks import Tasks, check_kind, task_id
from manyhats.server.service.text_threads import ENTRY_WEIGHT, paced

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.output import EncodeOutput
    from manyhats.engine.text.tokenizer import ReadText, Tokenizer, TokenSpan
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call

MAX_TASKS = 16
"""How many tasks one call puts its texts to."""
MAX_TOKEN_SCORES = 1024 * 1024
"""How many labels of tokens one answer tells."""

# How many of a vector's values take the time of a character to tokenize.
_VALUES_PER_CHARACTER = 16

Vector = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """A vector for each text, in order.

    Attributes:
        vectors: [n] each, float32.
        num_tokens: of each text.
        usage: of all.
        adapter: the version they were made with; None for the base.
    """

    vectors: tuple[Vector, ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord | None


@dataclass(frozen=True, slots=True)
class Classifications:
    """The labels of each text, in order; ``num_tokens`` of each."""

    results: tuple[Scored, ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord


@dataclass(frozen=True, slots=True)
class TaggedToken:
    """One token of a text: its index, the characters [start, end) that it stands for, and its labels."""

    index: int
    start: int
    end: int
    scored: Scored


@dataclass(frozen=True, slots=True)
class Tagged(Generic[T]):
    """What is found in each text, in order: its tokens, special ones left out, or the entities that they make."""

    results: tuple[tuple[T, ...], ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord


@dataclass(frozen=True, slots=True)
class Ranked:
    """How relevant each text is to a query: (index, score), best first."""

    results: tuple[tuple[int, float], ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord


class Encodings:
    """Reads callers' texts with the adapter that their call names.

    Args:
        backend: its engine and store.
        metrics: counts.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._tasks = Tasks(backend)
        self._metrics = metrics

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
            check_kind(adapter, TaskKind.GENERATE, TaskKind.EMBED, base=self._backend.info.kind)
            pooling = None if adapter is None else read_pooling(adapter.labels)
        if pooling is Pooling.ALL:
            raise FieldInvalidError("pooling", "must give one vector a text")
        read = partial(
            self._encode,
            call,
            adapter,
            pooling=pooling,
            applies_head=False,
            cache_salt=cache_salt,
            priority=priority,
        )
        tokens, output = await self._read(adapter, inputs, "inputs", truncates, read)
        size = int(output.values[0].shape[1])
        if not 0 <= dimensions <= size:
            raise FieldInvalidError("dimensions", f"must be in [0, {size}], not {dimensions}")
        vectors = await self._backend.text_threads.run(
            partial(_vectors, output, dimensions or size, normalize),
            size * len(inputs) // _VALUES_PER_CHARACTER,
        )
        return Embeddings(vectors, _lengths(tokens), output.usage, adapter)

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
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY_TOKENS)

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
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY_TOKENS)

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
        adapter = self._of_kind(self._tasks.resolved(call), TaskKind.CLASSIFY)
        asked = TextPrompt(query, field="query")
        pairs = [TextPrompt(text, field=f"texts[{index}]", first=query) for index, text in enumerate(texts)]
        if truncates:  # the query is tokenized with each text, so that its own length must be bounded
            await self._check_fits(adapter, asked)
        read = partial(self._encode, call, adapter, priority=priority)
        tokens, output = await self._read(adapter, pairs, "texts", truncates, read)
        num_classes = output.values[0].shape[1]
        if num_classes != 1:
            raise FieldInvalidError(
                "task_id", f"{adapter.name} has {num_classes} classes; relevance needs a head with one"
            )
        logits = [float(values[0, 0]) for values in output.values]
        scores = logits if raw_scores else sigmoid(np.array(logits)).tolist()
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        best = tuple((index, scores[index]) for index in order[: top_n or None])
        return Ranked(best, _lengths(tokens), output.usage, adapter)

    def _of_kind(self, adapter: AdapterRecord | None, kind: TaskKind) -> AdapterRecord:
        check_kind(adapter, kind, base=self._backend.info.kind)
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
        read = partial(self._encode, call, adapter, request_id=request_id, priority=priority)
        tokens, output = await self._read(adapter, inputs, "inputs", truncates, read)
        logits = np.concatenate(output.values)
        results = await self._backend.text_threads.build(
            partial(scored_rows, adapter, logits, raw_scores, top_k), num_scores(output, top_k)
        )
        return Classifications(results, _lengths(tokens), output.usage, adapter)

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
        encode = partial(self._encode, call, adapter, priority=priority)
        tokens, output = await self._read(adapter, inputs, "inputs", truncates, encode)
        count = num_scores(output, top_k)
        if count > MAX_TOKEN_SCORES:
            raise FieldInvalidError(
                "top_k", f"leaves {count} scores of all tokens together; the limit is {MAX_TOKEN_SCORES}"
            )

        def work() -> tuple[tuple[T, ...], ...]:
            texts = paced(
                zip(inputs, tokens, output.values, strict=True), lambda each: ENTRY_WEIGHT * len(each[2])
            )
            return tuple(
                find(each.text, _spans(tokenizer, each, len(read.token_ids)), values)
                for each, read, values in texts
            )

        results = await self._backend.text_threads.build(work, count)
        return Tagged(results, _lengths(tokens), output.usage, adapter)

    async def _check_fits(self, adapter: AdapterRecord, text: TextPrompt) -> None:
        tokenizer = await self._tasks.tokenizer_of(adapter)
        try:
            await self._tasks.encoder(tokenizer, self._backend.engine.max_context_length).read(text)
        except PromptTooLongError as error:
            error.renamed(text.field)
            raise

    async def _read(
        self,
        adapter: AdapterRecord | None,
        inputs: Sequence[Prompt],
        field: str,
        truncates: bool,
        read: Callable[[tuple[ReadText, ...]], Awaitable[EncodeOutput]],
    ) -> tuple[tuple[ReadText, ...], EncodeOutput]:
        """The tokens of texts, and what is read in them; errors call the texts ``field``."""
        limit = self._backend.engine.max_context_length
        while True:
            tokens = await self._tokens(adapter, inputs, field, truncates, limit)
            try:
                return tokens, await read(tokens)
            except PromptTooLongError as error:
                error.renamed(error.field.replace("inputs", field, 1))
                if not truncates or error.limit >= limit:
                    raise
                limit = error.limit  # of the context, as much as the adapter's virtual tokens leave

    async def _tokens(
        self,
        adapter: AdapterRecord | None,
        inputs: Sequence[Prompt],
        field: str,
        truncates: bool,
        limit: int,
    ) -> tuple[ReadText, ...]:
        check_num_inputs(len(inputs), field)
        encoder = self._tasks.encoder(await self._tasks.tokenizer_of(adapter), limit)
        found = []
        for index, each in enumerate(inputs):
            with _named(f"{field}[{index}]"):
                found.append(await encoder.read(each, truncates=truncates))
            # Short texts are tokenized here: others get a turn after each.
            await asyncio.sleep(0)
        return tuple(found)

    async def _encode(
        self,
        call: Call,
        adapter: AdapterRecord | None,
        tokens: tuple[ReadText, ...],
        *,
        request_id: str = "",
        pooling: Pooling | None = None,
        applies_head: bool = True,
        cache_salt: str = "",
        priority: int = 0,
    ) -> EncodeOutput:
        request = EncodeRequest(
            id=request_id or call.id,
            inputs=tuple(each.token_ids for each in tokens),
            token_types=_types(tokens),
            pooling=pooling,
            applies_head=applies_head,
            adapter=adapter,
            priority=priority,
            deadline_s=call.deadline_s,
            cache_salt=cache_salt,
            accepted_s=call.received_s,
        )
        output = await self._backend.engine.encode(request)
        self._metrics.encoded(task_id(adapter), output.usage)
        return output


def together(usages: Sequence[Usage]) -> Usage:
    """What requests cost that ran together: all of their tokens, and the time of the slowest."""
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
        queue_s=max(usage.queue_s for usage in usages),
        prefill_s=max(usage.prefill_s for usage in usages),
        adapter_load_s=max(usage.adapter_load_s for usage in usages),
    )


def _lengths(tokens: Sequence[ReadText]) -> tuple[int, ...]:
    return tuple(len(each.token_ids) for each in tokens)


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
