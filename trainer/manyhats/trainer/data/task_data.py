"""One task's data as tokens, by the base's text or the task's own, checked as a whole before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from manyhats.adapters.disk.files import open_local
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.text_files import read_text
from manyhats.adapters.limits import AdapterLimits
from manyhats.engine.checkpoints.loader import GenerationDefaults, LoadedModel
from manyhats.engine.text.ending import find_ends
from manyhats.trainer.data.contents import Prompted, checked_contents
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.head_contents import head_contents
from manyhats.trainer.data.labels import LabelledItem, check_label, find_labels, labelled_items
from manyhats.trainer.data.reading import read_rows
from manyhats.trainer.data.tokenization import Tokenization, tokenize_rows
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.settings import DataSettings, TrainSettings


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """The data that a task is trained and evaluated on.

    Attributes:
        held_out: None if there is none.
        labels: scored as completions; empty for none.
        items: the held-out rows with labels, if there are labels.
    """

    train: Dataset
    held_out: Dataset | None
    labels: tuple[str, ...] = ()
    items: Sequence[LabelledItem] = ()


def check_first_rows(settings: TrainSettings, sources: Iterable[str]) -> None:
    """Read the first row of each source, to find errors that need no base before it is loaded.

    Raises:
        DataError: a source cannot be read, or its first row cannot be trained on, or has none of the labels.
    """
    data = settings.data
    for source in sources:
        row = next(read_rows(source, max_rows=1))
        if settings.head.reads:
            head_contents(row, settings.head.kind, data)
            continue
        contents = checked_contents(row, data)
        if source == data.eval and isinstance(contents, Prompted):
            check_label(row, contents.completion, data.labels)


def read_task_data(
    settings: DataSettings,
    model: LoadedModel,
    num_virtual_tokens: int,
    *,
    now: datetime | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> TaskData:
    """Read and tokenize the data.

    Args:
        settings: name the sources.
        model: gives the tokenizer, and the context length, which includes virtual tokens.
        num_virtual_tokens: the adapter's.
        now: the date a chat template may write.
        on_row: called at each row; an exception from it ends the reading.

    Raises:
        DataError: a row is wrong; names file and line.
        SettingError: ``max_length`` or ``labels`` is wrong.
    """
    ends = find_ends(model.tokenizer, model.generation.eos_token_ids)
    room = model.architecture.max_context_length - num_virtual_tokens
    how = Tokenization(
        tokenizer=model.tokenizer,
        ends=ends,
        settings=settings,
        max_length=longest_row(settings, room),
        vocab_size=model.architecture.vocab_size,
        now=now,
        on_row=on_row,
    )
    return tokenize_task_data(how, room)


def tokenize_task_data(how: Tokenization, room: int) -> TaskData:
    """Read and tokenize without a model, for rows and labels within this many tokens."""
    settings = how.settings
    train = tokenize_rows(read_rows(settings.train, max_rows=settings.max_train_rows), how)
    if not settings.eval:
        return TaskData(train, None, (), ())
    labels = find_labels(settings.labels, train) if settings.labels else ()
    held_out = tokenize_rows(read_rows(settings.eval, max_rows=settings.max_eval_rows), how, labels)
    items = labelled_items(held_out, labels) if labels else ()
    _check_room(held_out, items, room)
    return TaskData(train, held_out, labels, items)


def longest_row(settings: DataSettings, room: int) -> int:
    """The longest allowed row, in tokens.

    Args:
        room: what virtual tokens leave of the base's context.

    Raises:
        SettingError: ``max_length`` exceeds it, or there is no room at all.
    """
    if room < 2:
        raise SettingError("num_virtual_tokens", "leaves no room for a row in the base's context")
    if settings.max_length is None:
        return room
    if settings.max_length > room:
        raise SettingError("max_length", f"the base has room for {room} tokens, not counting virtual tokens")
    return settings.max_length


def _check_room(held_out: Dataset, items: Sequence[LabelledItem], room: int) -> None:
    """Every label must fit after every prompt."""
    for index, item in enumerate(items):
        if item.num_tokens > room:
            raise held_out.error(
                index,
                f"its prompt has {len(item.prompt_token_ids)} tokens, which leaves no room for the longest label "
                f"and its end within {room}",
            )


def with_text_of(model: LoadedModel, init_from: str) -> tuple[LoadedModel, Mapping[str, bytes]]:
    """The base as an artifact's task sees it, and the artifact's text files, which the trained artifact keeps.

    Args:
        model: the base.
        init_from: the artifact's directory; empty for none.

    Raises:
        SettingError: ``init_from``: its text files cannot be used on this base.
    """
    if not init_from:
        return model, {}
    try:
        with open_local(Path(init_from).resolve()) as directory:
            files = read_text(directory, AdapterLimits().max_size_bytes)
        tokenizer = model.texts.read(files).tokenizer
    except AdapterError as error:
        raise SettingError("init_from", f"{init_from}: {error}") from error
    ends = {token_id for token_id in tokenizer.eos_token_ids if token_id < model.architecture.vocab_size}
    generation = GenerationDefaults(eos_token_ids=model.generation.eos_token_ids | ends)
    return (
        replace(model, tokenizer=tokenizer, generation=generation),
        {name: bytes(content) for name, content in files.items()},
    )
