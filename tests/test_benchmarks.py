"""The benchmark: a whole run on a tiny model, and how its rows are judged and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from benchmarks.measure import Measurement, Sample, percentile
from benchmarks.registrations import Gap, summarize
from benchmarks.report import evaluate, table
from benchmarks.row import Judge, Pick, Row, at_least, at_most
from benchmarks.rows import ROWS, SUBJECTS
from benchmarks.service import Stream, common_steps
from benchmarks.speculation import Answers, Message
from benchmarks.worker import Worker, WorkerError
from benchmarks.workload import MIXED_CASE, VIRTUAL_CASES, Case, Workload, quick_settings

from support.factories.saying_model import make_saying_checkpoint
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny, running_engine

ROOT = Path(__file__).parents[1]


def sample(system: str, index: int, variant: str = "", **figures: float) -> Sample:
    return Sample(
        system=system, variant=variant, case="base/1", round=index, measurement=Measurement(figures)
    )


def row(judge: Judge, **fields: Any) -> Row:
    against = None if judge == "value" else Pick("theirs", "base/1", "speed")
    ours = Pick("ours", "base/1", "speed")
    return Row(
        subject="base", title="speed", unit="tokens/s", ours=ours, against=against, judge=judge, **fields
    )


def test_ratio_is_taken_round_by_round() -> None:
    samples = [sample("ours", i, speed=v) for i, v in enumerate((20, 30, 44))]
    samples += [sample("theirs", i, speed=v) for i, v in enumerate((10, 20, 20))]
    (result,) = evaluate([row("ratio", floor=at_least(1.9))], samples)
    assert (result.judged.median, result.judged.min, result.judged.max) == (2.0, 1.5, 2.2)
    assert (result.ours.median, result.verdict) == (30, "ok")


def test_the_other_systems_best_variant_is_compared_with() -> None:
    samples = [sample("ours", 0, speed=20), sample("theirs", 0, "bfloat16", speed=4)]
    samples.append(sample("theirs", 0, "float32", speed=10))
    (result,) = evaluate([row("ratio", floor=at_least(2.1))], samples)
    assert (result.against_variant, result.judged.median, result.verdict) == ("float32", 2.0, "MISSED")
    assert "tokens/s (float32)" in table([result])
    assert table([result]).endswith("2x        ≥ 2.1x  MISSED")


def test_cost_is_a_percentage_over_the_other() -> None:
    samples = [sample("ours", 0, speed=105), sample("theirs", 0, speed=100)]
    (result,) = evaluate([row("percent over", floor=at_most(10))], samples)
    assert result.judged.median == pytest.approx(5)
    assert result.verdict == "ok"


def test_difference_is_in_the_rows_own_unit() -> None:
    samples = [sample("ours", i, speed=v) for i, v in enumerate((3.0, 4.5))]
    samples += [sample("theirs", i, speed=v) for i, v in enumerate((2.5, 3.0))]
    (result,) = evaluate([row("difference", floor=at_most(0.9))], samples)
    assert (result.judged.min, result.judged.max, result.verdict) == (0.5, 1.5, "MISSED")
    assert table([result]).endswith("1 tokens/s (0.5–1.5)  ≤ 0.9 tokens/s  MISSED")


def test_cost_far_below_nothing_is_doubtful() -> None:
    samples = [sample("ours", 0, speed=5), sample("theirs", 0, speed=100)]
    (result,) = evaluate([row("percent over", floor=at_most(10, plausible_from=-5))], samples)
    assert result.verdict == "DOUBTFUL"


def test_times_of_a_busy_machine_are_doubtful_and_bytes_are_not() -> None:
    busy = Sample(
        system="machine", variant="", case="busy", round=0, measurement=Measurement({"busy_cores": 1.5})
    )
    samples = [busy, sample("ours", 0, speed=2)]
    timed = row("value", floor=at_least(1))
    timed_result, bytes_result = evaluate([timed, replace(timed, unit="MiB")], samples)
    assert (timed_result.verdict, bytes_result.verdict) == ("DOUBTFUL", "ok")


def test_row_without_samples_is_left_out() -> None:
    assert evaluate([row("ratio")], [sample("ours", 0, speed=1)]) == []
    assert evaluate([row("value")], [sample("ours", 0, other=1)]) == []


def test_every_floor_of_the_project_has_its_row() -> None:
    floors = {(each.subject, each.floor.bound, each.floor.value) for each in ROWS if each.floor is not None}
    assert floors == {
        ("base", "at least", 1.6),
        ("base", "at least", 1.4),
        ("lora", "at least", 6.0),
        ("lora", "at least", 0.75),
        ("methods", "at least", 0.75),
        ("methods", "at most", 5.0),
        ("methods", "at most", 1.0),
        ("grpc", "at most", 10.0),
        ("memory", "at most", 0.54),
        ("start", "at most", 8.0),
        ("store", "at most", 1.0),
        ("store", "at most", 20.0),
        ("store", "at most", 0.5),
        ("store", "at most", 2.0),
        ("encoders", "at least", 1.0),
        ("encoders", "at least", 4.0),
        ("tiers", "at least", 0.7),
        ("tiers", "at least", 300),
        ("tiers", "at most", 1.2),
        ("tiers", "at most", 10),
        ("tiers", "at most", 60),
    }


def test_percentile_interpolates() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([7], 99) == 7


def test_common_steps_are_those_in_which_all_streams_decode() -> None:
    early, late = Stream(0.0, (1.0, 2.0, 3.0, 4.0)), Stream(0.0, (2.0, 3.0, 5.0))
    gaps_s, mean_s = common_steps([early, late])
    assert gaps_s == [1.0, 1.0, 1.0]
    assert mean_s == pytest.approx(2 * 2.0 / 3)


def test_streams_that_never_overlap_give_all_their_gaps() -> None:
    assert common_steps([Stream(0.0, (1.0, 2.0)), Stream(0.0, (3.0, 6.0))]) == ([1.0, 3.0], 2.0)


def test_largest_gap_is_a_multiple_of_its_own_streams_median() -> None:
    def stream(*seconds: float) -> list[Gap]:
        ends = list(accumulate(seconds, initial=0.0))
        return [Gap(begin, end) for begin, end in pairwise(ends)]

    slow, quick = stream(4.0, 4.0, 6.0, 4.0, 4.0), stream(1.0, 1.5, *[1.0] * 7, 2.5, *[1.0] * 10)
    figures = summarize([slow, quick], 8.0, 14.0, {"path": [0.2, 0.3, 0.7], "upload": [0.4]}).figures
    assert (figures["alone_largest_gap"], figures["beside_largest_gap"]) == (1.5, 2.5)
    assert (figures["path_s"], figures["upload_s"], figures["slowest_s"]) == (0.3, 0.4, 0.7)


def test_gap_that_a_registration_touches_is_disturbed_by_it() -> None:
    gaps = [Gap(0.0, 1.0), Gap(1.0, 3.0), Gap(3.0, 6.0), Gap(6.0, 10.0), Gap(10.0, 15.0)]
    measured = summarize([gaps], 2.0, 6.5, {"path": [1.0], "upload": [1.0]})
    assert measured.times["alone"] == [1.0]
    assert measured.times["beside"] == [2.0, 3.0, 4.0]


def test_prompts_differ_by_sequence_and_seed_and_repeat() -> None:
    workload = Workload(
        settings=quick_settings(1),
        model="m",
        directory=Path("m"),
        scratch=Path("s"),
        vocab_size=4096,
        linear_parameters=1,
    )
    prompts = workload.prompts(Case(8), 0)
    others = workload.prompts(Case(8), 1)
    assert len({tuple(prompt) for prompt in prompts + others}) == 16
    assert prompts == workload.prompts(Case(8), 0)


def test_rows_of_a_mixed_case_have_distinct_adapters_of_each_method() -> None:
    methods = Counter(adapter.method for adapter in MIXED_CASE.adapters)
    assert methods == {"lora": 8, "bottleneck": 8, "prefix": 8, "prompt": 8}


def test_virtual_tokens_count_as_context() -> None:
    workload = Workload(
        settings=quick_settings(1),
        model="m",
        directory=Path("m"),
        scratch=Path("s"),
        vocab_size=4096,
        linear_parameters=1,
    )
    for case in (*VIRTUAL_CASES, MIXED_CASE):
        for row, prompt in enumerate(workload.prompts(case, 0)):
            adapter = case.adapter_of(row)
            num_virtual = workload.settings.virtual_tokens if adapter and adapter.is_virtual else 0
            assert num_virtual + len(prompt) == workload.settings.prompt_tokens


def test_worker_answers_and_reports_what_fails() -> None:
    with Worker(PurePosixPath, "/a/b") as worker:
        assert worker.call("with_name", "c") == PurePosixPath("/a/c")
        with pytest.raises(WorkerError, match="no attribute 'leave'"):
            worker.call("leave")
        assert worker.call("is_absolute") is True


def test_worker_says_why_its_object_cannot_be_made() -> None:
    with Worker(Fraction, "none") as worker, pytest.raises(WorkerError, match="Invalid literal"):
        worker.wait_ready()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Mapping[str, Any]]:
    """The table and the JSON of a quick run of everything."""
    directory = tmp_path_factory.mktemp("benchmark")
    model = make_checkpoint(directory / "model")
    path = directory / "new" / "results.json"
    encoder = make_encoder(directory / "encoder")
    options = ["--quick", "--threads", "1", "--model", str(model), "--encoder", str(encoder)]
    options += ["--json", str(path)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_run_shows_every_row(finished: tuple[str, Mapping[str, Any]]) -> None:
    shown, document = finished
    assert len(document["rows"]) == len(ROWS)
    for each in ROWS:
        assert f"{each.subject}: {each.title} " in shown


@pytest.mark.slow
def test_run_writes_the_machine_and_every_sample(finished: tuple[str, Mapping[str, Any]]) -> None:
    _, document = finished
    assert document["machine"]["cpu"]
    assert document["machine"]["versions"]["torch"]
    assert document["settings"]["threads"] == 1
    assert {"commit", "flags", "load_average", "time_utc"} <= document["machine"].keys()
    systems = {each["system"] for each in document["samples"]}
    assert systems == {"transformers", "peft", "engine", "grpc", "server", "machine"}
    cases = {each["case"].removeprefix("probe ") for each in document["samples"]}
    assert cases == {
        "base/1",
        "base/8",
        "base/32",
        "lora/32x1",
        "lora/32x8",
        "lora/32x32",
        "mixed/32x32",
        "prefix/1x1",
        "prefix/32x1",
        "prompt/1x1",
        "prompt/32x1",
        "held/1",
        "held/100",
        "memory",
        "start",
        "start/many",
        "start/none",
        "lookup",
        "registration/1",
        "registration/8",
        "registration/32",
        "encode/float32",
        "encode/bfloat16",
        "encode/nf4",
        "busy",
    }
    for each in document["samples"]:
        assert each["system"] == "machine" or all(
            value > 0 for value in each["measurement"]["figures"].values()
        )


@pytest.mark.slow
def test_requests_of_one_prompt_task_hold_its_blocks_once(
    finished: tuple[str, Mapping[str, Any]],
) -> None:
    _, document = finished
    held = {
        each["case"]: each["measurement"]["figures"]["held_blocks"]
        for each in document["samples"]
        if each["case"].startswith("held/")
    }
    assert held == {"held/1": 1.0, "held/100": 1.0}


def test_the_cost_of_a_token_is_shown_for_every_way(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    options = ["--model", str(model), "--streams", "1,3", "--steps", "5", "--step-ms", "10", "--rounds", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.wire", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    head, *lines = run.stdout.splitlines()
    assert head.split() == ["µs", "a", "token", "streams", "all", "engine", "loop", "others"]
    rows = [line.split() for line in lines]
    ways = ("grpc", "completions", "chat", "bare")
    assert [row[:2] for row in rows] == [[way, streams] for streams in "13" for way in ways]
    for _, _, total, *parts in rows:
        assert float(total) > 0
        assert sum(map(float, parts)) == pytest.approx(float(total), abs=0.3)


def test_unknown_subject_is_named() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "base,colour"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert f"unknown: colour; there are {', '.join(SUBJECTS)}" in run.stderr


async def test_speculation_is_measured_against_the_same_answers_without(tmp_path: Path) -> None:
    said = list(range(40, 50))
    model = load_tiny(make_saying_checkpoint(tmp_path / "model", said))
    messages = [Message("tiny", tuple(said[index:]), 40, None) for index in range(3)]
    async with running_engine(model) as engine:
        answers = Answers(engine, 7)
        rounds = [await answers.by_turns(messages)]
        rounds += [await answers.together(messages, 2, is_first_with=first) for first in (False, True)]
    assert not answers.differing
    for each in rounds:
        assert each.without.tokens == each.with_.tokens == 3 * 39
        assert (each.without.drafts, each.without.accepted) == (0, 0)
        assert 60 < each.with_.accepted <= each.with_.drafts
        assert each.ratio == each.with_.rate / each.without.rate > 0


async def test_an_answer_that_changes_with_speculation_is_told(tmp_path: Path) -> None:
    model = load_tiny(make_saying_checkpoint(tmp_path / "model", list(range(40, 50))))
    async with running_engine(model) as engine:
        answers = Answers(engine, 7)
        await answers.by_turns([Message("a", (40, 41), 5, None)])
        await answers.by_turns([Message("b", (40, 41), 5, None), Message("a", (40, 41), 6, None)])
    assert answers.differing == {"a"}
