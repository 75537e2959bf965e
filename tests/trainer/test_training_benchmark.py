"""The benchmark of training: a whole run on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.training.__main__ import rows
from benchmarks.training.cases import CASES, TrainingWorkload, tokens_per_s

from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import make_checkpoint
from support.factories.wordnet import write_wordnet

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_quick_run_compares_whole_steps_of_both_trainers(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", "llama")
    arguments = ["--quick", "--threads", "1", "--only", "completion", "--model", str(checkpoint)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *arguments, "--json", str(tmp_path / "run.json")],
        cwd=ROOT,
        env={**os.environ, "MANYHATS_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert row["ours"]["median"] > 0
    assert row["against"]["median"] > 0
    assert row["row"]["floor"]["value"] == 1.2
    assert "a quarter learned" in run.stdout


def test_both_systems_are_given_the_same_rows_of_each_case() -> None:
    workload = TrainingWorkload(model="", directory=Path(), vocab_size=1000, threads=1)
    for case in CASES:
        drawn = workload.rows(case, 3, 5)
        assert drawn == workload.rows(case, 3, 5) != workload.rows(case, 4, 5)
        assert len(drawn) == 6 * workload.batch_size
        shortest, longest = case.lengths
        for ids, first in drawn:
            assert shortest <= len(ids) <= longest
            assert first >= 1
            assert len(ids) - first == min(len(ids) - 1, round(len(ids) * case.learned_share))


def test_the_first_step_warms_up_and_is_not_counted() -> None:
    assert tokens_per_s([100, 30, 50], [9.0, 1.0, 3.0]) == 20.0


def test_every_case_has_the_floor() -> None:
    assert [row.floor.value for row in rows(CASES) if row.floor] == [1.2] * len(CASES)


@pytest.mark.slow
def test_heads_are_compared_with_peft_s_on_the_same_rows(tmp_path: Path) -> None:
    checkpoint = make_encoder(tmp_path / "tiny")
    wordnet = write_wordnet(tmp_path / "data.noun", 12)
    sizes = [
        "--seeds",
        "1",
        "--num-train",
        "100",
        "--num-eval",
        "60",
        "--epochs",
        "1",
        "--rank",
        "2",
        "--threads",
        "1",
    ]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.training.heads",
            "--model",
            str(checkpoint),
            "--wordnet",
            str(wordnet),
            *sizes,
        ],
        cwd=ROOT,
        env={**os.environ, "MANYHATS_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    for system in ("manyhats", "PEFT without dropout", "PEFT"):
        assert f"seed 0, {system}: accuracy " in run.stdout
    assert " points" in run.stdout.splitlines()[-1]
