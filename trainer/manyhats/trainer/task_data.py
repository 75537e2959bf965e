"""One task's data as tokens, checked as a whole before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manyhats.engine.model.loader import LoadedModel
from manyhats.engine.tokenizer import Tokenizer
from manyhats.trainer.data import (
    Dataset,
    LabelledItem,
    choose_eos_token_id,
    find_labels,
    label_token_ids,
    labelled_items,
    read_rows,
    tokenize_rows,
)
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings import DataSettings


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """What a task trains on and is evaluated on.

    Attributes:
        held_out: None where there is none.
        labels: scored as completions; empty for none.
        label_token_ids: theirs, in order.
        items: of the held-out rows, where there are labels.
    """

    train: Dataset
    held_out: Dataset | None
    labels: tuple[str, ...]
    label_token_ids: tuple[tuple[int, ...], ...]
    items: Sequence[LabelledItem]


def check_readable(sources: Iterable[str]) -> None:
    """Read the first row of each source, so that what is missing is missed early.

    Raises:
        DataError: a source cannot be read, or its first row.
    """
    for source in sources:
        next(read_rows(source, max_rows=1))


def read_task_data(settings: DataSettings, model: LoadedModel, num_virtual_tokens: int) -> TaskData:
    """Read and tokenize the data.

    Args:
        settings: where it is.
        model: its tokenizer, and its context, which virtual tokens take their part of.
        num_virtual_tokens: of the adapter.

    Raises:
        DataError: a row; names file and line.
        SettingError: ``max_length`` or ``labels``.
    """
    eos_token_id = choose_eos_token_id(model.tokenizer, model.generation.eos_token_ids)
    room = model.config.max_context_length - num_virtual_tokens
    return tokenize_task_data(settings, model.tokenizer, eos_token_id, room)


def tokenize_task_data(
    settings: DataSettings, tokenizer: Tokenizer, eos_token_id: int, room: int
) -> TaskData:
    """The same without a model, for rows and labels within so many tokens."""
    max_length = longest_row(settings, room)

    def tokenized(source: str, max_rows: int | None) -> Dataset:
        rows = read_rows(source, max_rows=max_rows)
        return tokenize_rows(rows, tokenizer, eos_token_id, settings, max_length)

    train = tokenized(settings.train, settings.max_train_rows)
    held_out = tokenized(settings.eval, settings.max_eval_rows) if settings.eval else None
    if held_out is None or not settings.labels:
        return TaskData(train, held_out, (), (), ())
    labels = find_labels(settings.labels, train)
    token_ids = label_token_ids(labels, tokenizer)
    items = labelled_items(held_out, labels)
    _check_room(held_out, items, max(map(len, token_ids)), room)
    return TaskData(train, held_out, labels, token_ids, items)


def longest_row(settings: DataSettings, room: int) -> int:
    """Tokens of the longest row that is allowed.

    Args:
        room: of the base's context what virtual tokens leave.

    Raises:
        SettingError: ``max_length`` is more than that, or there is no room at all.
    """
    if room < 2:
        raise SettingError("num_virtual_tokens", "leaves no room for a row in the base's context")
    if settings.max_length is None:
        return room
    if settings.max_length > room:
        raise SettingError("max_length", f"the base has room for {room} tokens, virtual tokens not counted")
    return settings.max_length


def _check_room(held_out: Dataset, items: Sequence[LabelledItem], longest_label: int, room: int) -> None:
    """Every label must fit behind every prompt."""
    for index, item in enumerate(items):
        if len(item.prompt_token_ids) + longest_label > room:
            raise held_out.error(
                index,
                f"its prompt has {len(item.prompt_token_ids)} tokens, which leaves no room for the longest label "
                f"of {longest_label} within {room}",
            )
