"""What rows say to heads: classes, numbers, sets, tags and related texts; and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.batch import IGNORED, collate_read
from manyhats.trainer.data.head_data import HeadData, read_head_data
from manyhats.trainer.data.head_task import Loss
from manyhats.trainer.data.head_tokens import NOTHING, TextReading
from manyhats.trainer.errors import DataError, SettingError
from manyhats.trainer.settings.head import HeadSettings
from manyhats.trainer.settings.settings import DataSettings
from support.factories.head_tasks import head_base

Rows = Sequence[Mapping[str, Any]]


def read(
    directory: Path,
    head: str,
    rows: Rows,
    held_out: Rows = (),
    *,
    family: str = "bert",
    max_length: int = 100,
    text: str = "",
    **data: Any,
) -> HeadData:
    for name, part in (("train", rows), ("eval", held_out)):
        content = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(text if text and name == "train" else content)
    settings = DataSettings(
        train=str(directory / "train.jsonl"), eval=str(directory / "eval.jsonl") if held_out else "", **data
    )
    model = head_base(family).model
    how = TextReading(
        tokenizer=model.tokenizer,
        head=head,
        settings=settings,
        max_length=max_length,
        vocab_size=model.architecture.vocab_size,
        padding_id=model.padding_id,
    )
    return read_head_data(HeadSettings(kind=head), how, Pooling.MEAN)  # type: ignore[arg-type]


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]


# What is learned


@pytest.mark.parametrize(
    ("labels", "loss", "classes", "targets"),
    [
        (["b", "a", "b"], Loss.CROSS_ENTROPY, ("a", "b"), [(1,), (0,), (1,)]),
        ([10, 9, 10], Loss.CROSS_ENTROPY, ("9", "10"), [(1,), (0,), (1,)]),
        ([True, False], Loss.CROSS_ENTROPY, ("false", "true"), [(1,), (0,)]),
        ([0.5, 2, -1.25], Loss.SQUARED_ERROR, (), [(0.5,), (2,), (-1.25,)]),
        ([["b"], [], ["a", "b"]], Loss.BINARY_CROSS_ENTROPY, ("a", "b"), [(0, 1), (0, 0), (1, 1)]),
        ([[3], [1, 3]], Loss.BINARY_CROSS_ENTROPY, ("1", "3"), [(0, 1), (1, 1)]),
    ],
)
def test_labels_say_what_is_learned(
    tmp_path: Path, labels: list[Any], loss: Loss, classes: tuple[str, ...], targets: list[Any]
) -> None:
    data = read(tmp_path, "classification", labelled(*labels))
    assert (data.task.kind, data.task.loss, data.task.classes) == (TaskKind.CLASSIFY, loss, classes)
    assert [row.targets for row in data.train.rows] == targets
    assert data.train.rows.num_targets == sum(map(len, targets))


def test_classes_may_be_given_in_their_order(tmp_path: Path) -> None:
    data = read(tmp_path, "classification", labelled("b", "a"), labels=("c", "b", "a"))
    assert data.task.classes == ("c", "b", "a")
    assert [row.targets for row in data.train.rows] == [(1,), (2,)]


def test_classes_of_the_held_out_rows_are_those_of_the_training_rows(tmp_path: Path) -> None:
    data = read(tmp_path, "classification", labelled("a", "b"), labelled("b"))
    assert data.held_out is not None
    assert [row.targets for row in data.held_out.rows] == [(1,)]
    with pytest.raises(DataError, match=r"eval\.jsonl:2: label: 'c' is not one of the 2 classes"):
        read(tmp_path, "classification", labelled("a", "b"), labelled("b", "c"))


def test_texts_are_tokenized_as_the_server_reads_them(tmp_path: Path) -> None:
    rows = [{"text": "one", "text_pair": "two words", "label": "a"}, {"text": "three", "label": "b"}]
    data = read(tmp_path, "classification", rows)
    tokenizer = head_base("bert").model.tokenizer
    assert [row.texts for row in data.train.rows] == [
        (tokenizer.read("two words", add_special_tokens=True, first="one"),),
        (tokenizer.read("three", add_special_tokens=True),),
    ]


def test_types_of_tokens_are_kept(tmp_path: Path) -> None:
    rows = read(tmp_path, "classification", labelled("a", "b")).train.rows[:]
    with_types = [
        type(row)((ReadText((5, 6, 7), (0, 0, 1)),), row.targets, row.num_targets) for row in rows[:1]
    ]
    batch = collate_read([*with_types, rows[1]])
    assert batch.token_types is not None
    assert batch.token_types[:3].tolist() == [0, 0, 1]
    assert not batch.token_types[3:].any()
    assert collate_read(rows).token_types is None


def test_a_word_s_first_token_has_its_tag(tmp_path: Path) -> None:
    rows = [{"tokens": ["Max", "ate", "the", "pie"], "tags": ["B-PER", "O", "O", "O"]}]
    data = read(tmp_path, "tokens", rows)
    assert data.task.classes == ("B-PER", "O")
    tokenizer = head_base("bert").model.tokenizer
    spans = tokenizer.spans("Max ate the pie", add_special_tokens=True, max_tokens=99)
    first = [next(i for i, span in enumerate(spans) if span.end > start) for start in (0, 4, 8, 12)]
    assert data.train.words == (tuple(first),)
    (row,) = data.train.rows
    assert row.targets == tuple(
        [0.0, 1.0, 1.0, 1.0][first.index(place)] if place in first else IGNORED
        for place in range(len(row.texts[0].token_ids))
    )
    assert row.num_targets == 4


def test_words_that_are_cut_off_are_not_learned(tmp_path: Path) -> None:
    rows = [{"tokens": ["ab", "cd", "ef"], "tags": ["A", "B", "A"]}]
    data = read(tmp_path, "tokens", rows, max_length=5, overlong="truncate")
    assert data.train.words[0][2] == NOTHING
    assert data.train.rows[0].num_targets == 2
    assert data.train.counts.truncated == 1


def test_related_texts_stay_together(tmp_path: Path) -> None:
    rows = [{"query": "q", "positive": "p", "negatives": ["n", "m"]}, {"query": "r", "positive": "s"}]
    data = read(tmp_path, "embedding", rows)
    assert (data.task.kind, data.task.pooling) == (TaskKind.EMBED, Pooling.MEAN)
    assert [len(row.texts) for row in data.train.rows] == [4, 2]
    assert data.train.rows.lengths.tolist() == [
        sum(len(text.token_ids) for text in row.texts) for row in data.train.rows
    ]


def test_tables_have_lists_as_json(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('tokens,tags\n"[""a"", ""b""]","[""X"", ""O""]"\n')
    model = head_base("bert").model
    how = TextReading(
        tokenizer=model.tokenizer,
        head="tokens",
        settings=DataSettings(train=str(tmp_path / "train.csv")),
        max_length=50,
        vocab_size=320,
    )
    assert read_head_data(HeadSettings(kind="tokens"), how, Pooling.MEAN).task.classes == ("O", "X")


# Lengths


def test_texts_that_are_too_long(tmp_path: Path) -> None:
    rows = [*labelled("a", "b"), {"text": "x" * 40, "label": "a"}]
    with pytest.raises(DataError, match=r"train\.jsonl:3: text: has 40 tokens; the limit is 20"):
        read(tmp_path, "classification", rows, max_length=20)
    assert len(read(tmp_path, "classification", rows, max_length=20, overlong="skip").train.rows) == 2
    cut = read(tmp_path, "classification", rows, max_length=20, overlong="truncate").train
    assert (len(cut.rows[2].texts[0].token_ids), cut.counts.truncated) == (20, 1)


# What is wrong


@pytest.mark.parametrize(
    ("head", "row", "message"),
    [
        ("classification", {"text": "x"}, "has text, but no label"),
        ("classification", {"label": "x"}, "has label, but no text"),
        ("classification", {"prompt": "x", "completion": "y"}, "has prompt, completion, but no text"),
        ("classification", {"text": "", "label": "a"}, "text: is empty"),
        ("classification", {"text": 5, "label": "a"}, "text: must be a string, not int"),
        ("classification", {"text": "x", "text_pair": 5, "label": "a"}, "text_pair: must be a string"),
        (
            "classification",
            {"text": "x", "label": {}},
            "label: must be a string, a number or a list, not dict",
        ),
        ("classification", {"text": "x", "label": ""}, "label: is empty"),
        ("classification", {"text": "x", "label": [0.5]}, r"label\[0\]: must be a string, not float"),
        ("classification", {"text": "x", "label": "a", "more": 1}, "more: nothing reads it"),
        ("tokens", {"tokens": ["x"], "tags": []}, "tags: has 0; tokens has 1"),
        ("tokens", {"tokens": [], "tags": []}, "tokens: is empty"),
        ("tokens", {"tokens": ["x", " "], "tags": ["O", "O"]}, r"tokens\[1\]: is white space"),
        ("tokens", {"tokens": "x y", "tags": ["O", "O"]}, "tokens: must be a list"),
        ("tokens", {"tokens": ["x", 3], "tags": ["O", "O"]}, r"tokens\[1\]: must be a string, not int"),
        ("tokens", {"tokens": ["x"], "tags": [1.5]}, r"tags\[0\]: must be a string, not float"),
        ("embedding", {"query": "x"}, "has query, but no positive"),
        ("embedding", {"query": "x", "positive": "y", "negatives": "z"}, "negatives: must be a list"),
        ("embedding", {"query": "x", "positive": "y", "negatives": [""]}, r"negatives\[0\]: is empty"),
    ],
)
def test_a_wrong_row_is_named_with_its_field(
    tmp_path: Path, head: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: " + message):
        read(tmp_path, head, [row])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", 1], r"train\.jsonl:2: label: is a whole number; that of line 1 is a string"),
        ([["a"], "a"], r"train\.jsonl:2: label: is a string; that of line 1 is a list"),
        (["a", "a"], r"train\.jsonl: has only the class 'a'; a head needs 2 or more"),
        ([[], []], r"train\.jsonl: has no class; a head needs 1 or more"),
        ([f"{index}" for index in range(257)], r"train\.jsonl:257: has the 257th class"),
    ],
)
def test_labels_must_fit_each_other(tmp_path: Path, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "classification", labelled(*labels))


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"NaN|finite"):
        read(tmp_path, "classification", [], text='{"text": "x", "label": NaN}\n')


def test_given_classes_must_fit_the_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: 'b' is not one of the 2 classes"):
        read(tmp_path, "classification", labelled("a", "b"), labels=("a", "c"))
    with pytest.raises(SettingError, match="labels: 'a' appears twice"):
        read(tmp_path, "classification", labelled("a", "b"), labels=("a", "a"))
    with pytest.raises(SettingError, match=r"labels: the labels of .* are numbers"):
        read(tmp_path, "classification", labelled(0.5, 0.25), labels=("a", "b"))


@pytest.mark.parametrize(
    ("rows", "held_out", "message"),
    [
        (["a", "b"], [0.5], "label: 0.5 is of another kind"),
        (["a", "b"], [["a"]], r"label: \('a',\) is of another kind"),
        ([["a"]], ["a"], "label: 'a' is of another kind"),
        ([0.5, 1.5], ["a"], "label: must be a number, as in the training data, not 'a'"),
    ],
)
def test_held_out_labels_are_of_the_same_kind(
    tmp_path: Path, rows: list[Any], held_out: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"eval\.jsonl:1: " + message):
        read(tmp_path, "classification", labelled(*rows), labelled(*held_out))


def test_padding_is_refused_where_positions_do_not_count_it(tmp_path: Path) -> None:
    assert head_base("roberta").model.padding_id == 1
    rows = [{"text": "a<|im_start|>b", "label": "a"}, {"text": "x", "label": "b"}]
    with pytest.raises(DataError, match=r"train\.jsonl:1: text: has the token 1, which is padding"):
        read(tmp_path, "classification", rows, family="roberta")
    assert len(read(tmp_path, "classification", rows).train.rows) == 2


def test_fields_that_nothing_reads_can_be_ignored(tmp_path: Path) -> None:
    rows = [{**row, "id": 3} for row in labelled("a", "b")]
    data = read(tmp_path, "classification", rows, ignore_fields=True)
    assert data.train.counts.ignored == {"id": 2}
