"""Rows are read from every kind of file, and whatever is wrong is named with its file and line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.trainer.data import lines
from manyhats.trainer.data.reading import DatasetName, parse_dataset_name, read_rows
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ü\n", "completion": '"x", y'}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    def write_file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write_file


def rows_of(source: str) -> list[Row]:
    return list(read_rows(source))


def refusal(source: str) -> DataError:
    with pytest.raises(DataError) as caught:
        rows_of(source)
    assert caught.value.source == source
    return caught.value


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    encoded = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(encoded))
    (tmp_path / "b.json").write_text("[" + ",\n".join(encoded) + "]\n")
    (tmp_path / "c.json").write_text("\n".join(encoded))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t"), ("g.CSV", ",")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for path in sorted(tmp_path.iterdir()):
        rows = rows_of(str(path))
        assert [row.fields for row in rows] == ROWS, path.name
        assert {row.source for row in rows} == {str(path)}


def test_no_more_rows_are_read_than_asked_for(write: Callable[[str, bytes], str]) -> None:
    source = write("a.jsonl", b'{"text": "a"}\n{"text": "b"}\nnot JSON\n')
    assert [row.fields["text"] for row in read_rows(source, max_rows=2)] == ["a", "b"]
    assert len(list(read_rows(source, max_rows=1))) == 1


def test_json_lines_may_have_a_byte_order_mark_blank_lines_and_dos_line_ends(
    write: Callable[[str, bytes], str],
) -> None:
    source = write("a.jsonl", b'\xef\xbb\xbf\r\n{"text": "a"}\r\n\n  \t\r\n {"text": "b\\u2028"} ')
    assert [(row.line, row.fields) for row in rows_of(source)] == [
        (2, {"text": "a"}),
        (5, {"text": "b\u2028"}),
    ]


GOOD = b'{"text": "a"}\n\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is not JSON: Expecting ',' delimiter, at character 13"),
        (b'{"text": "a"} {"text": "b"}', "something follows the JSON object, at character 14"),
        (b'{"text": "a", "text": "b"}', "the key 'text' appears twice"),
        (b'{"text": "a", "x": {"y": 1, "y": 2}}', "the key 'y' appears twice"),
        (b'{"text": NaN}', "NaN is not a number in JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", ":3: has a number with too many digits"),
        (b'{"text": ' + b"[" * 100_000, "is nested too deeply"),
        (b'["a"]', "must be a JSON object, not a list"),
        (b'"a"', "must be a JSON object, not a string"),
        (b"null", "must be a JSON object, not null"),
        (b"true", "must be a JSON object, not a boolean"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 11 of the line is 0xff"),
        (b'{"text": "a\tb"}', "Invalid control character"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"text", "is not JSON"),
    ],
)
def test_a_bad_line_is_named(write: Callable[[str, bytes], str], line: bytes, message: str) -> None:
    error = refusal(write("a.jsonl", GOOD + line + b"\n"))
    assert error.line == 3
    assert message in str(error)
    assert str(error).startswith(f"{error.source}:3: ")
    assert len(str(error)) < 400


def test_a_line_that_is_too_long_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"short\n" + b"x" * 100 + b"\n")
    assert next(lines.text_lines(path, 100)) == (1, "short\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer than 100 bytes"):
        list(lines.text_lines(path, 100))
    assert len(list(lines.text_lines(path, 101))) == 2


def test_a_file_without_line_ends_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines.text_lines, "__defaults__", (1024,))
    (tmp_path / "a.jsonl").touch()
    os.truncate(tmp_path / "a.jsonl", 2**30)
    assert "longer than 1024 bytes" in str(refusal(str(tmp_path / "a.jsonl")))


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1),
    indent=st.sampled_from([None, 0, 3]),
    gaps=st.lists(st.integers(0, 3), min_size=1),
)
@settings(max_examples=50)
def test_a_json_list_gives_each_object_with_the_line_it_begins_on(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], indent: int | None, gaps: list[int]
) -> None:
    encoded = [json.dumps({"text": text, "n": [1]}, indent=indent) for text in texts]
    content, expected = "[", []
    for index, each in enumerate(encoded):
        content += "\n" * gaps[index % len(gaps)]
        expected.append(content.count("\n") + 1)
        content += each + ("," if index < len(encoded) - 1 else "\n]\n")
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(content, encoding="utf-8")
    rows = rows_of(str(path))
    assert [row.fields["text"] for row in rows] == texts
    assert [row.line for row in rows] == expected


ONE_OBJECT = "is an object; a .json file holds a list of objects, or one object per line"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'[\n{"text": "a"}\n{"text": "b"}]', 3, "lacks a comma or its end"),
        (b'[\n{"text": "a"},\n]', 3, "is not JSON: Expecting value"),
        (b'[\n{"text": "a"},\n{\n"text": }]', 4, "is not JSON: Expecting value"),
        (b'[\n{"text": "a"}\n', 3, "lacks a comma or its end"),
        (b'[\n{"text": "a"}]\n\n{}', 4, "something follows the list"),
        (b"[\n1]", 2, "must be a JSON object, not a number"),
        (b'[\n{"text": "a"},\n{"text": "\xff"}]', 3, "is not UTF-8: byte 11"),
        (b'[\n\n{"a": 1, "a": 2}]', 3, "the key 'a' appears twice"),
        (b"[ ]", None, "has no rows"),
        (b"[ ] 1", 1, "something follows the list"),
        (b'{\n "text": "a"\n}\n', None, ONE_OBJECT),
        (b'\xef\xbb\xbf\n{"data": [\n{"text": "a"}]}', None, ONE_OBJECT),
        (b'{"data": [{"text": "a"}]}\n', None, ONE_OBJECT),
        (b'{"text": "a", "text": "b"}\n', 1, "the key 'text' appears twice"),
        (b'{"text": "a"\n}\n{"text": "b"}', 1, "is not JSON: Expecting ',' delimiter"),
    ],
)
def test_a_bad_json_list_is_named_with_its_line(
    write: Callable[[str, bytes], str], content: bytes, line: int | None, message: str
) -> None:
    error = refusal(write("a.json", content))
    assert error.line == line
    assert message in str(error)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(
    records=st.lists(st.tuples(CELLS.filter(bool), CELLS), min_size=1),
    newline=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=50)
def test_csv_records_have_the_line_they_begin_on_whatever_their_cells_hold(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]], newline: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    expected = []
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
        writer.writerow(["prompt", "completion"])
        for record in records:
            file.flush()
            expected.append(path.read_bytes().count(b"\n") + 1)
            writer.writerow(record)
    rows = rows_of(str(path))
    assert [row.line for row in rows] == expected
    assert [(row.fields["prompt"], row.fields.get("completion", "")) for row in rows] == records


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'text\n"a\nb"\nc,d\n', 4, "has 2 cells; the header names 1 columns"),
        (b"prompt,completion\na\n", 2, "has 1 cells; the header names 2 columns"),
        (b'text\na\n"b\nc', 3, "is not CSV: unexpected end of data"),
        (b'text\n"a"b\n', 2, "is not CSV"),
        (b"text\na\n\xff\n", 3, "is not UTF-8: byte 1 of the line is 0xff"),
        (b'text\n"a\n\xff\n"\n', 3, "is not UTF-8"),
        (b"text,text\na,b\n", None, "has two columns named 'text'"),
        (b"instruction,output\na,b\n", None, "has the columns instruction, output, but none of prompt"),
        (b"prompt,answer\na,b\n", None, "has no column 'completion'; its columns are prompt, answer"),
        (b"completion,system\na,b\n", None, "has no column 'prompt'; its columns are completion, system"),
        (b"text\n\n\n", None, "has no rows"),
        (b"", None, "has no rows"),
    ],
)
def test_bad_csv_is_named_with_its_line(
    write: Callable[[str, bytes], str], content: bytes, line: int | None, message: str
) -> None:
    error = refusal(write("a.csv", content))
    assert error.line == line
    assert message in str(error)


def test_long_csv_cells_are_read_and_the_limit_of_the_process_stays(
    write: Callable[[str, bytes], str],
) -> None:
    limit = csv.field_size_limit()
    rows = read_rows(write("a.csv", b"id,text\n1," + b"x" * (limit + 1) + b"\n2,y\n"))
    assert len(str(next(rows).fields["text"])) == limit + 1
    assert csv.field_size_limit() == limit
    assert next(rows).fields == {"id": "2", "text": "y"}


def test_every_column_of_parquet_is_read_and_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"t{i}" for i in range(3000)], "image": [b"\xff"] * 3000})
    pq.write_table(table, path, row_group_size=700)
    rows = rows_of(str(path))
    assert [(row.line, row.fields) for row in rows] == [
        (i + 1, {"text": f"t{i}", "image": b"\xff"}) for i in range(3000)
    ]


def test_parquet_has_messages_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "text": None}]), path)
    assert rows_of(str(path))[0].fields == {"messages": messages, "text": None}


def test_bad_parquet_is_named(tmp_path: Path, write: Callable[[str, bytes], str]) -> None:
    assert "is not readable Parquet" in str(refusal(write("a.parquet", b"PAR1, it says")))
    assert "is not readable Parquet" in str(refusal(write("b.parquet", b"")))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "c.parquet")
    assert "has the columns a, but none of prompt" in str(refusal(str(tmp_path / "c.parquet")))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    assert "has no rows" in str(refusal(str(tmp_path / "d.parquet")))


def test_a_parquet_string_that_is_no_text_is_named_with_its_row(tmp_path: Path) -> None:
    texts = [b"a"] * 1500
    texts[1200] = b"\xff"
    column = pa.array(texts, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    error = refusal(str(tmp_path / "a.parquet"))
    assert error.line == 1201
    assert "is not UTF-8" in str(error)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[50:5000] = bytes(4950)
    path.write_bytes(content)
    assert "is not readable Parquet" in str(refusal(str(path)))


@given(begin=st.integers(0, 2000), length=st.integers(1, 400), byte=st.sampled_from([0, 0x7F, 0xFF]))
@settings(max_examples=100)
def test_damaged_parquet_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, begin: int, length: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 5 for i in range(100)]}), path, compression="none")
    content = path.read_bytes()
    begin %= len(content)
    path.write_bytes(
        content[:begin] + bytes([byte]) * min(length, len(content) - begin) + content[begin + length :]
    )
    try:
        rows_of(str(path))
    except DataError as error:
        known = ("is not readable Parquet", "has the columns", "is not UTF-8", "has no rows")
        assert any(what in str(error) for what in known), str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_is_not_there_or_not_readable_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be read: No such file or directory" in str(refusal(str(tmp_path / name)))
    (tmp_path / name).write_bytes(b"")

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read: Permission denied" in str(refusal(str(tmp_path / name)))


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(
    write: Callable[[str, bytes], str],
) -> None:
    assert "has none of the supported extensions: .jsonl, .json, .csv, .tsv, .parquet" in str(
        refusal(write("a.txt", b"a"))
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "pipe"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert str(refusal(str(tmp_path / name))).endswith(f"{name}: is not a regular file")
    os.symlink(tmp_path / name, tmp_path / "link.jsonl")
    assert str(refusal(str(tmp_path / "link.jsonl"))).endswith("is not a regular file")


def test_a_device_and_a_socket_are_refused(tmp_path: Path) -> None:
    os.symlink("/dev/null", tmp_path / "a.jsonl")
    assert "is not a regular file" in str(refusal(str(tmp_path / "a.jsonl")))
    assert "is not a regular file" in str(refusal("/dev/null"))
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(tmp_path):
        listening.bind("b.jsonl")
        assert "is not a regular file" in str(refusal("b.jsonl"))


def test_a_link_to_a_file_is_read(tmp_path: Path, write: Callable[[str, bytes], str]) -> None:
    os.symlink(write("a.jsonl", b'{"text": "a"}'), tmp_path / "b.jsonl")
    assert rows_of(str(tmp_path / "b.jsonl"))[0].fields == {"text": "a"}


def test_lines_of_objects_without_a_known_field_are_rows_all_the_same(
    write: Callable[[str, bytes], str],
) -> None:
    lines_of_chats = b'{"conversations": ["a"]}\n{"conversations": ["b"]}\n'
    assert len(rows_of(write("a.json", lines_of_chats))) == 2
    assert len(rows_of(write("b.json", b'{"question": "a"}\n'))) == 1
    assert "has no rows" in str(refusal(write("c.json", b"\n")))


def test_an_empty_file_is_refused(write: Callable[[str, bytes], str]) -> None:
    error = refusal(write("a.jsonl", b"\n\n"))
    assert error.line is None
    assert "has no rows" in str(error)


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The datasets package keeps its tables here, asks no network, and draws no bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "data"


def test_a_directory_is_read_by_the_datasets_package(dataset_cache: Path) -> None:
    dataset_cache.mkdir()
    for split, texts in (("train", "ab"), ("test", "c")):
        content = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
        (dataset_cache / f"{split}.jsonl").write_text(content)
    rows = rows_of(str(dataset_cache))
    assert [(row.line, row.fields["text"]) for row in rows] == [(1, "a"), (2, "b")]
    assert [row.fields["text"] for row in rows_of(f"{dataset_cache}:test")] == ["c"]
    assert [row.fields["text"] for row in rows_of(f"{dataset_cache}:train[1:]+test")] == ["b", "c"]
    error = refusal(f"{dataset_cache}:nosuch")
    assert "the datasets package cannot load it" in str(error)


def test_a_configuration_of_a_data_set_is_chosen_by_name(dataset_cache: Path) -> None:
    dataset_cache.mkdir()
    card = "---\nconfigs:\n"
    for config in ("one", "two"):
        (dataset_cache / f"{config}.jsonl").write_text(json.dumps({"text": config}) + "\n")
        card += f"- config_name: {config}\n  data_files: {config}.jsonl\n"
    (dataset_cache / "README.md").write_text(f"{card}---\n")
    assert rows_of(f"{dataset_cache}/two:train")[0].fields == {"text": "two"}
    assert rows_of(f"{dataset_cache}/one")[0].fields == {"text": "one"}
    assert "cannot load it" in str(refusal(str(dataset_cache)))
    assert "cannot load it" in str(refusal(f"{dataset_cache}/three"))


def test_a_saved_data_set_is_read(dataset_cache: Path) -> None:
    table = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": table}).save_to_disk(dataset_cache / "both")
    table.save_to_disk(dataset_cache / "one")
    assert rows_of(f"{dataset_cache}/both:train")[0].fields == {"text": "a"}
    assert rows_of(f"{dataset_cache}/one")[0].fields == {"text": "a"}
    assert "cannot load it" in str(refusal(f"{dataset_cache}/both:nosuch"))


def test_a_data_set_without_known_columns_is_refused(dataset_cache: Path) -> None:
    datasets.Dataset.from_list([{"question": "a"}]).save_to_disk(dataset_cache)
    assert "has the columns question, but none of prompt" in str(refusal(str(dataset_cache)))


def test_an_empty_directory_is_refused(tmp_path: Path, dataset_cache: Path) -> None:
    dataset_cache.mkdir()
    error = refusal(str(dataset_cache))
    assert "is a directory, and the datasets package cannot load it: " in str(error)
    (dataset_cache / "a.jsonl").mkdir()
    assert "a.jsonl: is a directory, and" in str(refusal(str(dataset_cache / "a.jsonl")))


def test_a_name_that_the_hub_does_not_give_is_refused(dataset_cache: Path) -> None:
    assert "the datasets package cannot load it" in str(refusal("no-such-org/no-such-data"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("squad", DatasetName("squad", None, "train")),
        ("org/name", DatasetName("org/name", None, "train")),
        ("org/name:test", DatasetName("org/name", None, "test")),
        ("nyu-mll/glue/sst2:train[:10%]", DatasetName("nyu-mll/glue", "sst2", "train[:10%]")),
    ],
)
def test_names_of_data_sets_are_taken_apart(source: str, name: DatasetName) -> None:
    assert parse_dataset_name(source) == name


@pytest.mark.parametrize(
    "source", ["", "a/b/c/d", "/no/such", "./no", "../no/such", "a b", "~/data", ":train"]
)
def test_what_is_neither_a_path_nor_a_name_is_refused(source: str) -> None:
    assert "is neither a file, a directory nor the name of a data set" in str(refusal(source))


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("org/name", "datasets")])
def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}: pip install {package}" in str(refusal(name))
