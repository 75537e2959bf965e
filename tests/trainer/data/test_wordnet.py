"""The WordNet task: rows from Debian's package, held-out definitions apart from the training ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from examples.wordnet import (
    CATEGORIES,
    DATA_FILE,
    Definition,
    definition_rows,
    distinct,
    even_quotas,
    prompt_of,
    read_definitions,
    wordnet_rows,
)
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.reading import read_rows
from support.factories.default_model import default_model_directory
from support.factories.wordnet import synset, write_wordnet

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("gloss", "text"),
    [
        ("a small animal", "a small animal"),
        ('a small animal; "I saw one"; "and another"', "a small animal"),
        ('a small animal; or a large one; "I saw one"- A. Writer', "a small animal; or a large one"),
        ('a small animal "I saw one"', "a small animal"),
        ('a small animal: "I saw one"', "a small animal"),
        ("  a   small animal | with a bar ", "a small animal | with a bar"),
    ],
)
def test_a_definition_is_the_gloss_without_its_examples(tmp_path: Path, gloss: str, text: str) -> None:
    (tmp_path / "data.noun").write_text(synset(1, gloss))
    assert read_definitions(tmp_path / "data.noun") == [Definition(text, "animal")]


@pytest.mark.parametrize("gloss", ['"only an example of it"', "too short", "long " * 41])
def test_what_defines_nothing_is_left_out(tmp_path: Path, gloss: str) -> None:
    (tmp_path / "data.noun").write_text(synset(1, gloss))
    assert read_definitions(tmp_path / "data.noun") == []


def test_a_definition_of_two_categories_is_left_out_and_equal_ones_are_kept_once() -> None:
    first = Definition("A thing", "act")
    definitions = [first, Definition("b", "act"), Definition("a thing", "act"), Definition("B", "time")]
    assert distinct([*definitions, Definition("b", "act")]) == [first]


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), share=st.floats(0, 1))
def test_quotas_are_as_even_as_the_sizes_let_them_be(sizes: list[int], share: float) -> None:
    total = int(sum(sizes) * share)
    quotas = even_quotas(sizes, total)
    assert sum(quotas) == total
    assert all(quota <= size for quota, size in zip(quotas, sizes, strict=True))
    bounded_by_others = [quota for quota, size in zip(quotas, sizes, strict=True) if quota < size]
    if bounded_by_others:
        assert max(quotas) - min(bounded_by_others) <= 1


def test_more_than_there_is_is_refused(tmp_path: Path) -> None:
    path = write_wordnet(tmp_path / "data.noun", 6)
    with pytest.raises(ValueError, match="1000 definitions were asked for"):
        wordnet_rows(num_train=1000, num_eval=5, path=path)


def test_held_out_definitions_are_apart_and_stay_for_any_number_of_training_rows(tmp_path: Path) -> None:
    path = write_wordnet(tmp_path / "data.noun", 12)
    small = wordnet_rows(num_train=30, num_eval=60, path=path)
    large = wordnet_rows(num_train=200, num_eval=60, path=path)
    assert small.eval == large.eval
    assert (len(small.train), len(large.train), len(small.eval)) == (30, 200, 60)
    prompts = {row["prompt"] for row in large.eval}
    assert len(prompts) == 60
    assert not prompts & {row["prompt"] for row in large.train}
    assert not any("the same in two" in row["prompt"] for row in [*large.train, *large.eval])
    assert Counter(row["completion"] for row in large.eval)[" motive"] == 1


def test_heads_are_given_the_same_definitions(tmp_path: Path) -> None:
    path = write_wordnet(tmp_path / "data.noun", 12)
    answers = wordnet_rows(num_train=40, num_eval=20, path=path)
    classes = definition_rows(num_train=40, num_eval=20, path=path)
    for ours, others in ((classes.train, answers.train), (classes.eval, answers.eval)):
        assert [(prompt_of(row["text"]), f" {row['label']}") for row in ours] == [
            (row["prompt"], row["completion"]) for row in others
        ]


def test_rows_are_the_same_for_a_seed_and_others_for_another(tmp_path: Path) -> None:
    path = write_wordnet(tmp_path / "data.noun", 12)
    first, again, other = (
        wordnet_rows(num_train=50, num_eval=50, seed=seed, path=path) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.train != other.train
    assert first.eval != other.eval


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.wordnet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_writes_rows_that_the_trainer_reads(tmp_path: Path) -> None:
    path = write_wordnet(tmp_path / "data.noun", 12)
    output = tmp_path / "out"
    done = run("--output", output, "--wordnet", path, "--num-train", 40, "--num-eval", 20)
    assert done.returncode == 0, done.stderr
    rows = wordnet_rows(num_train=40, num_eval=20, path=path)
    for name, expected in (("train", rows.train), ("eval", rows.eval)):
        found = list(read_rows(str(output / f"{name}.jsonl")))
        assert [row.fields for row in found] == expected
        assert json.loads((output / f"{name}.jsonl").read_text().splitlines()[0]) == expected[0]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "out", "--wordnet", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr.endswith("install Debian's package wordnet-base\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not DATA_FILE.is_file(), reason="needs Debian's package wordnet-base")
def test_wordnet_gives_enough_rows_and_no_category_is_a_free_win() -> None:
    rows = wordnet_rows()
    assert len(rows.eval) >= 3000
    assert not {row["prompt"].casefold() for row in rows.eval} & {
        row["prompt"].casefold() for row in rows.train
    }
    counts = Counter(row["completion"] for row in rows.eval)
    assert set(counts) == {f" {category}" for category in CATEGORIES.values()}
    assert max(counts.values()) / len(rows.eval) < 0.05


@pytest.mark.real_model
def test_the_default_model_has_a_token_for_each_category() -> None:
    tokenizer = Tokenizer.from_directory(default_model_directory())
    for category in CATEGORIES.values():
        assert len(tokenizer.encode(f" {category}", add_special_tokens=False)) == 1
    assert prompt_of("a thing") == "Definition: a thing\nKind of thing:"
