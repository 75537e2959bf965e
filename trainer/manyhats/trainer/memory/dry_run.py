"""From settings to a prediction, reading the base's config and, if available, its tokenizer and the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.model.describe import describe
from manyhats.engine.text.ending import find_ends
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.head_data import read_head_data
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.data.head_tokens import TextReading
from manyhats.trainer.data.task_data import check_first_rows, longest_row, tokenize_task_data
from manyhats.trainer.data.tokenization import Tokenization
from manyhats.trainer.memory.adapter_size import adapter_size
from manyhats.trainer.memory.batch_shape import BatchShape, behind, largest_batch, longest_rows
from manyhats.trainer.memory.prediction import MemoryPrediction, TaskSize, predict
from manyhats.trainer.memory.runtime import machine_of
from manyhats.trainer.memory.shape import BaseShape, read_shape
from manyhats.trainer.methods.head import check_reads
from manyhats.trainer.settings.settings import DataSettings, TrainSettings, with_quantization

NO_DATA = "-"
"""Given in place of a data file to predict without data."""

_TOKENIZER = "tokenizer.json"
_ANY_TOKEN_ID = 0
_FEW_CLASSES = ("first", "second")


def predict_memory(tasks: Sequence[TrainSettings], *, home: Path | None = None) -> MemoryPrediction:
    """Predict the peak memory of training one or several tasks on one base, without loading its weights.

    With data and a tokenizer the largest batch is known; otherwise it is assumed to have the longest rows allowed.

    Args:
        tasks: at least one; the base of the first is used for all.
        home: holds fetched models; None means the default.

    Raises:
        ModelError: the base has no config or an unsupported one.
        SettingError: a setting does not fit the base.
        DataError: the data cannot be used for training.
        BaseError: the base cannot do what a task is to do.
    """
    shape = read_shape(tasks[0].model.model, home)
    tasks = [with_quantization(settings, shape.quantization) for settings in tasks]
    model = tasks[0].model
    tokenizer = _tokenizer(shape)
    sizes = [_task_size(settings, shape, tokenizer) for settings in tasks]
    machine = machine_of(model, num_unread_tokens=0 if tokenizer else shape.architecture.vocab_size)
    return predict(sizes, shape, machine, _notes(sizes, tokenizer))


def _tokenizer(shape: BaseShape) -> Tokenizer | None:
    """The base's tokenizer, if it is next to the config."""
    has_tokenizer = (shape.directory / _TOKENIZER).is_file()
    return Tokenizer.from_directory(shape.directory) if has_tokenizer else None


def _task_size(settings: TrainSettings, shape: BaseShape, tokenizer: Tokenizer | None) -> TaskSize:
    base = describe(shape.family, names=(), digest="", has_pooler=bool(shape.family.layout.pooler))
    check_reads(settings, base)
    adapter = adapter_size(settings.adapter, shape.family)
    room = shape.architecture.max_context_length - adapter.num_virtual_tokens
    if not settings.head.reads:
        return TaskSize(settings, adapter, _batch(settings, room, tokenizer, shape.architecture.vocab_size))
    task, batch = _read_batch(settings, room, tokenizer, shape.architecture.vocab_size)
    adapter = adapter_size(settings.adapter, shape.family, task)
    # Virtual tokens that see a text run with it.
    ahead = adapter.num_in_layers if shape.architecture.attention.sees_all else 0
    return TaskSize(settings, adapter, behind(batch, ahead))


def _read_batch(
    settings: TrainSettings, room: int, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[HeadTask, BatchShape]:
    """What a head learns, and its largest batch; without data, a head of few classes, and the longest texts."""
    data, head = settings.data, settings.head
    if tokenizer is None or data.train == NO_DATA:
        check_first_rows(settings, _sources(data))
        longest = longest_rows(settings.optimization, longest_row(data, room))
        if head.task_kind is TaskKind.EMBED:  # a query and its answer
            longest = replace(longest, num_tokens=2 * longest.num_tokens, num_rows=2 * longest.num_rows)
        return HeadTask(kind=head.task_kind, loss=Loss.CROSS_ENTROPY, classes=_FEW_CLASSES), longest
    how = TextReading(
        tokenizer=tokenizer,
        head=head.kind,
        settings=data,
        max_length=longest_row(data, room),
        vocab_size=vocab_size,
    )
    read = read_head_data(head, how, Pooling.MEAN)
    return read.task, largest_batch(read.train, settings.optimization, shuffle=data.shuffle)


def _sources(data: DataSettings) -> list[str]:
    return [source for source in (data.train, data.eval) if source not in (NO_DATA, "")]


def _batch(settings: TrainSettings, room: int, tokenizer: Tokenizer | None, vocab_size: int) -> BatchShape:
    data = settings.data
    if tokenizer is None or data.train == NO_DATA:
        check_first_rows(
            settings, [source for source in (data.train, data.eval) if source not in (NO_DATA, "")]
        )
        return longest_rows(settings.optimization, longest_row(data, room))
    how = Tokenization(
        tokenizer=tokenizer,
        # As far as the tokenizer can tell: the generation config may name other end tokens.
        ends=find_ends(tokenizer, tokenizer.eos_token_ids or {_ANY_TOKEN_ID}),
        settings=data,
        max_length=longest_row(data, room),
        vocab_size=vocab_size,
    )
    tokenized = tokenize_task_data(how, room)
    return largest_batch(tokenized.train, settings.optimization, shuffle=data.shuffle)


def _notes(sizes: Sequence[TaskSize], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    notes = []
    if tokenizer is None:
        notes.append("the base's tokenizer is not available: all rows are assumed to have the maximum length")
    elif any(size.settings.data.train == NO_DATA for size in sizes):
        notes.append("no data is given: all rows are assumed to have the maximum length")
    if any(size.settings.data.labels or size.settings.head.reads for size in sizes):
        what = (
            "labels are scored"
            if not any(size.settings.head.reads for size in sizes)
            else "held-out rows are read"
        )
        notes.append(f"{what} by the engine after training; its memory is not included")
    return tuple(notes)
