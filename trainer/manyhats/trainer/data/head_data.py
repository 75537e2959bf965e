"""A head's data as tokens and targets, checked as a whole before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.trainer.data.batch import IGNORED
from manyhats.trainer.data.dataset import DataCounts
from manyhats.trainer.data.head_contents import (
    HeadContents,
    Label,
    LabelledText,
    TaggedWords,
    head_contents,
    name_of,
    unknown_head_fields,
)
from manyhats.trainer.data.head_rows import ReadDataset, ReadTexts
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.data.head_tokens import NOTHING, TextReading, read_contents
from manyhats.trainer.data.labels import AUTO, MAX_LABELS, check_distinct
from manyhats.trainer.data.reading import read_rows
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import DataError, SettingError
from manyhats.trainer.settings.head import HeadSettings


@dataclass(frozen=True, slots=True, eq=False)
class HeadData:
    """The data that a task with a head is trained and evaluated on; ``held_out`` is None if there is none."""

    task: HeadTask
    train: ReadDataset
    held_out: ReadDataset | None


def read_head_data(settings: HeadSettings, how: TextReading, pooling: Pooling) -> HeadData:
    """Read and tokenize the data.

    Args:
        settings: the head's.
        how: texts become tokens, and where they are.
        pooling: the base's, of vectors.

    Raises:
        DataError: a row is wrong; names file, line and field.
        SettingError: ``labels`` does not fit the data.
    """
    data = how.settings
    train = _read(data.train, data.max_train_rows, how)
    held_out = _read(data.eval, data.max_eval_rows, how) if data.eval else None
    task = _task(settings, data.labels, train, pooling)
    return HeadData(task, _dataset(train, task), None if held_out is None else _dataset(held_out, task))


@dataclass(slots=True, eq=False)
class _Read:
    """The rows of one source, whose classes are not numbered yet."""

    source: str
    texts: ReadTexts = field(default_factory=ReadTexts)
    lines: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    tags: list[tuple[str, ...]] = field(default_factory=list)
    words: list[tuple[int, ...]] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    counts: DataCounts = field(default_factory=DataCounts)

    def add(self, row: Row, contents: HeadContents, how: TextReading) -> tuple[bool, bool]:
        """Add a row; returns whether it was left out, and whether it was truncated."""
        read = read_contents(row, contents, how)
        if read is None:
            return True, False
        self.texts.add(read.texts)
        self.lines.append(row.line)
        if isinstance(contents, LabelledText):
            self.labels.append(contents.label)
        if isinstance(contents, TaggedWords):
            self.tags.append(contents.tags)
            self.words.append(read.words)
            self.num_tokens.append(len(read.texts[0].token_ids))
        return False, read.is_truncated

    def error(self, index: int, message: str) -> DataError:
        """What is wrong with a row."""
        return DataError(self.source, self.lines[index], message)


def _read(source: str, max_rows: int | None, how: TextReading) -> _Read:
    found = _Read(source)
    num_skipped = num_truncated = 0
    ignored: dict[str, int] = {}
    for row in read_rows(source, max_rows=max_rows):
        how.on_row()
        found.source = row.source
        contents = head_contents(row, how.head, how.settings)
        for name in unknown_head_fields(row, how.head):
            ignored[name] = ignored.get(name, 0) + 1
        is_skipped, is_truncated = found.add(row, contents, how)
        num_skipped += is_skipped
        num_truncated += is_truncated
    if not found.texts:
        raise DataError(source, None, f"all {num_skipped} rows are longer than {how.max_length} tokens")
    found.counts = DataCounts(skipped=num_skipped, truncated=num_truncated, ignored=ignored)
    return found


# Classes


def _task(settings: HeadSettings, labels: Sequence[str], train: _Read, pooling: Pooling) -> HeadTask:
    """What is to be learned, as the training rows show."""
    match settings.kind:
        case "classification":
            return _classification(labels, train)
        case "tokens":
            classes = _classes(labels, train, ((index, set(tags)) for index, tags in enumerate(train.tags)))
            return HeadTask(kind=TaskKind.CLASSIFY_TOKENS, loss=Loss.CROSS_ENTROPY, classes=classes)
        case _:
            own = pooling if settings.pooling == "auto" else Pooling(settings.pooling)
            return HeadTask(
                kind=TaskKind.EMBED, loss=Loss.CONTRASTIVE, pooling=own, temperature=settings.temperature
            )


def _classification(labels: Sequence[str], train: _Read) -> HeadTask:
    kind = _kind_of(train)
    if kind == "number":
        if labels:
            raise SettingError("labels", f"the labels of {train.source} are numbers, which have no names")
        return HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.SQUARED_ERROR)
    named = ((index, {*_names(label)}) for index, label in enumerate(train.labels))
    if kind == "list":
        classes = _classes(labels, train, named, at_least=1)
        return HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.BINARY_CROSS_ENTROPY, classes=classes)
    return HeadTask(
        kind=TaskKind.CLASSIFY,
        loss=Loss.CROSS_ENTROPY,
        classes=_classes(labels, train, named, are_numbers=kind == "whole number"),
    )


_KINDS: dict[type, str] = {str: "string", int: "whole number", float: "number", tuple: "list"}


def _kind_of(train: _Read) -> str:
    """What all labels are; whole numbers are numbers if others are not whole.

    Raises:
        DataError: they are not of one kind.
    """
    kinds = [_KINDS[type(label)] for label in train.labels]
    if set(kinds) == {"whole number", "number"}:
        return "number"
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise train.error(index, f"label: is a {kind}; that of line {train.lines[0]} is a {kinds[0]}")
    return kinds[0]


def _names(label: Label) -> tuple[str, ...]:
    """The classes that a label names."""
    return label if isinstance(label, tuple) else (name_of(label),) if isinstance(label, str | int) else ()


def _classes(
    labels: Sequence[str],
    train: _Read,
    named: Iterable[tuple[int, set[str]]],
    *,
    at_least: int = 2,
    are_numbers: bool = False,
) -> tuple[str, ...]:
    """The classes in the settings; otherwise those of the training rows, sorted, numbers by their value."""
    given = labels if labels and tuple(labels) != AUTO else ()
    check_distinct(given)
    found: set[str] = set(given)
    for index, names in named:
        unknown = sorted(names - found)
        if unknown and given:
            raise train.error(index, _none_of(unknown[0], given))
        found |= names
        if len(found) > MAX_LABELS:
            raise train.error(
                index, f"has the {MAX_LABELS + 1}th class; at most {MAX_LABELS} can be told apart"
            )
    if len(found) < at_least:
        only = f"only the class {next(iter(found))!r}" if found else "no class"
        raise DataError(train.source, None, f"has {only}; a head needs {at_least} or more")
    return tuple(given) or tuple(sorted(found, key=int if are_numbers else None))


def _none_of(name: str, classes: Sequence[str]) -> str:
    shown = name if len(name) <= 80 else f"{name[:80]}…"
    return f"{shown!r} is not one of the {len(classes)} classes"


# Targets


def _dataset(read: _Read, task: HeadTask) -> ReadDataset:
    """The rows with their targets."""
    if task.loss is Loss.CONTRASTIVE:
        count = len(read.texts)
        return ReadDataset(
            read.texts.with_targets([()] * count, [1] * count), read.source, read.lines, read.counts
        )
    index_of = {name: index for index, name in enumerate(task.classes)}
    tags = tuple(_tag_indices(read, index_of))
    targets = list(_token_targets(read, tags) if tags else _label_targets(read, task, index_of))
    terms = [sum(target != IGNORED for target in each) for each in targets]
    if 0 in terms:
        raise read.error(terms.index(0), "tokens: no word has a token that could be learned")
    return ReadDataset(
        read.texts.with_targets(targets, terms), read.source, read.lines, read.counts, tags, tuple(read.words)
    )


def _label_targets(read: _Read, task: HeadTask, index_of: dict[str, int]) -> Iterator[tuple[float, ...]]:
    for row, label in enumerate(read.labels):
        if task.loss is Loss.SQUARED_ERROR:
            if not isinstance(label, int | float):
                raise read.error(row, f"label: must be a number, as in the training data, not {label!r}")
            yield (float(label),)
            continue
        if isinstance(label, float) or isinstance(label, tuple) != (task.loss is Loss.BINARY_CROSS_ENTROPY):
            raise read.error(row, f"label: {label!r} is of another kind than those of the training data")
        names = _names(label)
        for name in names:
            if name not in index_of:
                raise read.error(row, f"label: {_none_of(name, task.classes)}")
        if task.loss is Loss.CROSS_ENTROPY:
            yield (float(index_of[names[0]]),)
        else:
            yield tuple(float(name in names) for name in task.classes)


def _tag_indices(read: _Read, index_of: dict[str, int]) -> Iterator[tuple[int, ...]]:
    for row, tags in enumerate(read.tags):
        for place, tag in enumerate(tags):
            if tag not in index_of:
                raise read.error(row, f"tags[{place}]: {_none_of(tag, tuple(index_of))}")
        yield tuple(index_of[tag] for tag in tags)


def _token_targets(read: _Read, tags: Sequence[tuple[int, ...]]) -> Iterator[list[float]]:
    """The class of each word at its token; the other tokens are not learned."""
    for own, words, count in zip(tags, read.words, read.num_tokens, strict=True):
        targets = [float(IGNORED)] * count
        for tag, token in zip(own, words, strict=True):
            if token != NOTHING:
                targets[token] = float(tag)
        yield targets
