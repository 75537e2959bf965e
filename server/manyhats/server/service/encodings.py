"""Reads texts for callers, whatever the transport: vectors, classes of texts and of tokens, relevance."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from manyhats.adapters.heads import Pooling, ScoreActivation, TaskKind
from manyhats.adapters.reserved_labels import CLASS, listed
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.request import MAX_INPUTS, EncodeRequest
from manyhats.server.service.prompts import Prompt, TextPrompt
from manyhats.server.service.tasks import check_kind, task_id

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.output import EncodeOutput, Usage
    from manyhats.engine.text.tokenizer import ReadText
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call
    from manyhats.server.service.tasks import Tasks

Vector = npt.NDArray[np.float32]


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
class ClassScore:
    """One label's score, and the logit that it comes from."""

    label: str
    index: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class Scored:
    """The labels of one text, or of one token, best first."""

    classes: tuple[ClassScore, ...]


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
class Tagged:
    """The labels of each text's tokens, special ones left out, in order."""

    results: tuple[tuple[TaggedToken, ...], ...]
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
        tasks: resolves what calls name.
        metrics: counts.
    """

    def __init__(self, backend: Backend, tasks: Tasks, metrics: Metrics) -> None:
        self._backend = backend
        self._tasks = tasks
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
        vectors = tuple(_vector(values[0], dimensions or size, normalize) for values in output.values)
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
        adapter = self._tasks.resolved(call)
        check_kind(adapter, TaskKind.CLASSIFY)
        assert adapter is not None
        read = partial(self._encode, call, adapter, priority=priority)
        tokens, output = await self._read(adapter, inputs, "inputs", truncates, read)
        results = tuple(_scored(adapter, values[0], raw_scores, top_k) for values in output.values)
        return Classifications(results, _lengths(tokens), output.usage, adapter)

    async def classify_tokens(
        self, call: Call, inputs: Sequence[TextPrompt], *, top_k: int = 0, priority: int = 0
    ) -> Tagged:
        """The labels of each text's tokens by the task's head; arguments as for ``classify``.

        Raises:
            TaskKindError: the task has no head for tokens.
            FieldInvalidError: a text cannot be read.
            EngineError, AdapterError: it cannot be served.
        """
        adapter = self._tasks.resolved(call)
        check_kind(adapter, TaskKind.CLASSIFY_TOKENS)
        assert adapter is not None
        tokenizer = await self._tasks.tokenizer_of(adapter) or self._backend.tokenizer
        tokens = await self._tokens(adapter, inputs)
        output = await self._encode(call, adapter, tokens, priority=priority)
        results = []
        for each, values in zip(inputs, output.values, strict=True):
            offsets = tokenizer.offsets(each.text, add_special_tokens=each.add_special_tokens)
            results.append(
                tuple(
                    TaggedToken(index, start, end, _scored(adapter, row, False, top_k))
                    for index, ((start, end), row) in enumerate(zip(offsets, values, strict=True))
                    if end > start
                )
            )
        return Tagged(tuple(results), _lengths(tokens), output.usage, adapter)

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
        adapter = self._tasks.resolved(call)
        check_kind(adapter, TaskKind.CLASSIFY)
        assert adapter is not None
        asked = TextPrompt(query, field="query")
        pairs = [TextPrompt(text, field=f"texts[{index}]", first=query) for index, text in enumerate(texts)]
        if truncates:  # the query is tokenized with each text, so that its own length must be bounded
            await self._check_fits(adapter, asked)
        read = partial(self._encode, call, adapter, priority=priority)
        tokens, output = await self._read(adapter, pairs, "texts", truncates, read)
        if output.values[0].shape[1] != 1:
            raise FieldInvalidError(
                "task_id",
                f"{adapter.name} has {output.values[0].shape[1]} labels; relevance needs a head with one",
            )
        logits = [float(values[0, 0]) for values in output.values]
        scores = logits if raw_scores else [_sigmoid(logit) for logit in logits]
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        best = tuple((index, scores[index]) for index in order[: top_n or None])
        return Ranked(best, _lengths(tokens), output.usage, adapter)

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
            tokens = await self._tokens(adapter, inputs, field, limit=limit, truncates=truncates)
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
        field: str = "inputs",
        *,
        limit: int | None = None,
        truncates: bool = False,
    ) -> tuple[ReadText, ...]:
        if not 1 <= len(inputs) <= MAX_INPUTS:
            raise FieldInvalidError(field, f"must have 1 to {MAX_INPUTS}, not {len(inputs)}")
        tokenizer = await self._tasks.tokenizer_of(adapter)
        encoder = self._tasks.encoder(tokenizer, limit or self._backend.engine.max_context_length)
        found = []
        for index, each in enumerate(inputs):
            try:
                found.append(await encoder.read(each, truncates=truncates))
            except PromptTooLongError as error:
                name = f"{field}[{index}]"
                raise PromptTooLongError(
                    name, error.num_tokens, error.limit, at_least=error.at_least
                ) from None
            # Short texts are tokenized here: others get a turn after each.
            await asyncio.sleep(0)
        return tuple(found)

    async def _encode(
        self,
        call: Call,
        adapter: AdapterRecord | None,
        tokens: tuple[ReadText, ...],
        *,
        pooling: Pooling | None = None,
        applies_head: bool = True,
        cache_salt: str = "",
        priority: int = 0,
    ) -> EncodeOutput:
        output = await self._backend.engine.encode(
            EncodeRequest(
                id=call.id,
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
        )
        self._metrics.encoded(task_id(adapter), output.usage)
        return output


def _lengths(tokens: Sequence[ReadText]) -> tuple[int, ...]:
    return tuple(len(each.token_ids) for each in tokens)


def _types(tokens: Sequence[ReadText]) -> tuple[tuple[int, ...], ...]:
    """Types of all tokens; empty if all are 0."""
    if not any(each.token_types for each in tokens):
        return ()
    return tuple(each.token_types or (0,) * len(each.token_ids) for each in tokens)


def _vector(values: Vector, size: int, normalize: bool) -> Vector:
    cut = values[:size].astype(np.float64)
    length = math.sqrt(float(cut @ cut))
    return (cut / length if normalize and length else cut).astype(np.float32)


def _scored(adapter: AdapterRecord, logits: Vector, raw_scores: bool, top_k: int) -> Scored:
    """The labels of one row of logits, best first; of equal ones the first."""
    names = listed(adapter.labels, CLASS) or tuple(f"LABEL_{index}" for index in range(len(logits)))
    values = logits.astype(np.float64)
    scores = values if raw_scores else _activated(values, adapter)
    order = np.argsort(-values, kind="stable")[: top_k or None].tolist()
    return Scored(
        tuple(ClassScore(names[index], index, float(scores[index]), float(values[index])) for index in order)
    )


def _activated(logits: npt.NDArray[np.float64], adapter: AdapterRecord) -> npt.NDArray[np.float64]:
    own = ScoreActivation.NONE if len(logits) == 1 else ScoreActivation.SOFTMAX
    activation = ScoreActivation(adapter.labels.get("classify.activation", own.value))
    if activation is ScoreActivation.NONE:
        return logits
    if activation is ScoreActivation.SIGMOID:
        return np.array([_sigmoid(float(logit)) for logit in logits])
    weights = np.exp(logits - logits.max())
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
