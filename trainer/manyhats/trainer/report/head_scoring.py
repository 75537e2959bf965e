"""How good a task with a head is on the evaluation data: texts are read by the engine, as the server reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import Dtype
from manyhats.engine.engine import Engine
from manyhats.engine.request import EncodeRequest
from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.head_rows import ReadDataset
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.data.head_tokens import NOTHING
from manyhats.trainer.report.metrics import (
    Metrics,
    of_class_sets,
    of_classes,
    of_numbers,
    of_ranks,
    of_tags,
)
from manyhats.trainer.report.served import SavedAdapter, Told, answers

_PER_REQUEST = 32
_ROUNDING = 1e-12
"""Of similarities: those of equal vectors may differ by less."""

Values = NDArray[np.float32]


def score_head(
    model: LoadedModel,
    saved: SavedAdapter,
    task: HeadTask,
    held_out: ReadDataset,
    *,
    dtype: Dtype,
    num_threads: int = 0,
    on_progress: Told = lambda done, total: None,
) -> tuple[Metrics | None, Metrics]:
    """How good the base alone is, which has vectors but no classes, and how good the adapter.

    Args:
        model: the base.
        saved: the adapter.
        task: what it is to tell.
        held_out: the rows.
        dtype: of the engine.
        num_threads: 0 takes one per processor.
        on_progress: called with how many requests are done, and their number.

    Raises:
        EngineError: the engine cannot read a text.
    """
    rows = held_out.rows[:]
    texts = [text for row in rows for text in row.texts]
    read = partial(_read_all, model, saved, dtype=dtype, num_threads=num_threads, on_progress=on_progress)
    if task.kind is not TaskKind.EMBED:
        return None, _metrics_of(task, held_out, read(texts, (saved.record,), None))
    distinct = list(dict.fromkeys(texts))
    vectors = read(distinct, (None, saved.record), task.pooling)
    place_of = {text: place for place, text in enumerate(distinct)}
    places = [[place_of[text] for text in row.texts] for row in rows]
    base, own = (np.concatenate(each) for each in (vectors[: len(distinct)], vectors[len(distinct) :]))
    return of_ranks(ranks(base, places)), of_ranks(ranks(own, places))


def ranks(vectors: Values, rows: Sequence[Sequence[int]]) -> list[int]:
    """The place of each row's answer among all texts but queries, by cosine similarity to the row's query.

    Args:
        vectors: [X, E], of any length.
        rows: places of each row's query, answer and other texts.
    """
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    documents = sorted({place for _, *others in rows for place in others})
    index_of = {place: index for index, place in enumerate(documents)}
    candidates = exact[documents]
    found = []
    for query, answer, *_ in rows:
        scores = candidates @ exact[query]
        found.append(1 + int((scores > scores[index_of[answer]] + _ROUNDING).sum()))
    return found


def _read_all(
    model: LoadedModel,
    saved: SavedAdapter,
    texts: Sequence[ReadText],
    adapters: Sequence[AdapterRecord | None],
    pooling: Pooling | None,
    *,
    dtype: Dtype,
    num_threads: int,
    on_progress: Told,
) -> list[Values]:
    """What is read in each text with each adapter, adapter by adapter."""
    parts = [texts[first : first + _PER_REQUEST] for first in range(0, len(texts), _PER_REQUEST)]
    found = answers(
        model,
        saved,
        [partial(_read, part, adapter, pooling) for adapter in adapters for part in parts],
        longest=max(len(text.token_ids) for text in texts),
        dtype=dtype,
        num_threads=num_threads,
        on_progress=on_progress,
    )
    return [values for part in found for values in part]


async def _read(
    texts: Sequence[ReadText], adapter: AdapterRecord | None, pooling: Pooling | None, engine: Engine
) -> Sequence[Values]:
    types: tuple[tuple[int, ...], ...] = ()
    if any(text.token_types for text in texts):
        types = tuple(text.token_types or (0,) * len(text.token_ids) for text in texts)
    output = await engine.encode(
        EncodeRequest(
            id="",
            inputs=tuple(text.token_ids for text in texts),
            token_types=types,
            pooling=pooling,
            applies_head=pooling is None,
            adapter=adapter,
        )
    )
    return output.values


def _metrics_of(task: HeadTask, held_out: ReadDataset, values: Sequence[Values]) -> Metrics:
    if task.kind is TaskKind.CLASSIFY_TOKENS:
        predicted = [
            [NOTHING if token == NOTHING else int(logits[token].argmax()) for token in words]
            for logits, words in zip(values, held_out.words, strict=True)
        ]
        return of_tags(predicted, held_out.tags, task.classes)
    logits = np.concatenate(values)
    right = np.array([row.targets for row in held_out.rows])
    match task.loss:
        case Loss.CROSS_ENTROPY:
            return of_classes(logits.argmax(axis=1), right[:, 0].astype(np.int64))
        case Loss.BINARY_CROSS_ENTROPY:
            return of_class_sets(logits > 0, right > 0)
        case _:
            return of_numbers(logits[:, 0].astype(np.float64), right[:, 0])
