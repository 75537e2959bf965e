"""From settings to a prediction, reading the base's config and, if available, its tokenizer and the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyhats.engine.text.ending import find_ends
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.task_data import check_first_rows, longest_row, tokenize_task_data
from manyhats.trainer.data.tokenization import Tokenization
from manyhats.trainer.memory.adapter_size import adapter_size
from manyhats.trainer.memory.batch_shape import BatchShape, largest_batch, longest_rows
from manyhats.trainer.memory.prediction import MemoryPrediction, TaskSize, predict
from manyhats.trainer.memory.runtime import machine_of
from manyhats.trainer.memory.shape import BaseShape, read_shape
from manyhats.trainer.settings.settings import TrainSettings

NO_DATA = "-"
"""Given in place of a data file to predict without data."""

_TOKENIZER = "tokenizer.json"
_ANY_TOKEN_ID = 0


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
    """
    model = tasks[0].model
    shape = read_shape(model.model, home)
    tokenizer = _tokenizer(shape)
    sizes = [_task_size(settings, shape, tokenizer) for settings in tasks]
    machine = machine_of(model, num_unread_tokens=0 if tokenizer else shape.architecture.vocab_size)
    return predict(sizes, shape, machine, _notes(sizes, tokenizer))


def _tokenizer(shape: BaseShape) -> Tokenizer | None:
    """The base's tokenizer, if it is next to the config."""
    has_tokenizer = (shape.directory / _TOKENIZER).is_file()
    return Tokenizer.from_directory(shape.directory) if has_tokenizer else None


def _task_size(settings: TrainSettings, shape: BaseShape, tokenizer: Tokenizer | None) -> TaskSize:
    adapter = adapter_size(settings.adapter, shape.family)
    room = shape.architecture.max_context_length - adapter.num_virtual_tokens
    return TaskSize(settings, adapter, _batch(settings, room, tokenizer, shape.architecture.vocab_size))


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
    if any(size.settings.data.labels for size in sizes):
        notes.append("labels are scored by the engine after training; its memory is not included")
    return tuple(notes)
