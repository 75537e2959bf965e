"""The benchmark of a GPU: a whole run in Triton's interpreter, how its parts end, and what its figures come to."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.gpu import row_bits, sanitizer, timing
from benchmarks.gpu.candidates import Candidate, Weights
from benchmarks.gpu.checks.check import Place
from benchmarks.gpu.checks.linears import check_linears
from benchmarks.gpu.compiling import StepJob, launch_step
from benchmarks.gpu.goals import GOALS, NOT_MEASURED, table
from benchmarks.gpu.measured import chosen, source
from benchmarks.gpu.model import make_model
from benchmarks.gpu.record import Found, Recorder, read
from benchmarks.gpu.run import BUDGET_S, PARTS, Part, limit_of, main, run_parts
from benchmarks.gpu.scale import CPU, GPU, TINY
from benchmarks.gpu.stepping import Engine, open_launched, open_strict
from torch import Tensor

from manyhats.engine.backends.cuda.linears import tiles as linear_tiles
from manyhats.engine.backends.cuda.linears.tiles import RowTiles
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.wants import Outcome, Wants

ROOT = Path(__file__).parents[1]
MOST_LINES = 60


def test_a_whole_run_in_the_interpreter(tmp_path: Path) -> None:
    """One test: tests that share a run may go to several processes, each of which would do it."""
    directory = tmp_path / "new"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--cpu", "--out", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = {part.name: read(directory, part.name) for part in PARTS}
    check_files(directory)
    check_kernels(found)
    check_what_is_lacking(found, run.stdout)
    check_table(run.stdout)
    assert "Nothing was measured" in (directory / "linear_tiles.py").read_text()
    assert strictly(directory / "configuration.json")["sm"] is None


def strictly(path: Path) -> Any:
    """JSON that others can read, too: without NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path}: {name}"))


def check_files(directory: Path) -> None:
    """Every part leaves all of its records."""
    kinds = {
        "0": {"versions", "copy", "product"},
        "A": {"compiled", "kernel"},
        "B": {"bits", "bits of attention", "bits of plain absmaxes"},
        "C": {"nf4", "gemm_4bit", "dequantize + mm", "head"},
        "D": {"attention", "deltas"},
        "E": {"model", "opened", "decode", "base rows", "prefill", "mixed"},
        "F": {"transformers", "peft, switched", "peft, in one batch"},
        "G": {"cold adapter", "steps"},
        "H": set(),
        "T": {"training"},
    }
    assert set(kinds) == {part.name for part in PARTS}
    for name, expected in kinds.items():
        document = strictly(directory / f"{name}.json")
        assert {what for what, _ in document["records"]} == expected, name
        assert document["failure"] == ""


def check_kernels(found: Mapping[str, Found]) -> None:
    """They are right, rows keep their bits, and losses fall."""
    kernels = found["A"].of("kernel")
    names = {name.strip() for each in kernels for name in each["kernel"].split(" ", 1)[0].split(",") if name}
    assert names == {"K1r", *(f"K{number}" for number in range(1, 15))}
    assert [each for each in kernels if not each["is_right"]] == []
    (compiled,) = found["A"].of("compiled")
    assert compiled["done"] == compiled["jobs"] > 0
    assert found["B"].of("bits", holds=False) == found["B"].of("bits of attention", holds=False) == []
    (trained,) = found["T"].of("training")
    assert (trained["optimizer"], trained["is_finite"], trained["falls"]) == ("adamw", True, True)


def check_what_is_lacking(found: Mapping[str, Found], shown: str) -> None:
    for part, what in (
        ("H", "compute-sanitizer"),
        ("T", "adamw_8bit"),
        ("T", "paged_adamw_8bit"),
        ("E", "graphs"),
    ):
        assert any(what in each for each in found[part].lacks)
        assert what in shown


def check_table(shown: str) -> None:
    """Every goal is there, and none is measured on a CPU."""
    tail = shown[shown.index("measured  must") :].splitlines()
    assert len(tail) <= MOST_LINES
    for goal in GOALS:
        (line,) = (line for line in tail if line.startswith(goal.title + "  "))
        assert line.endswith(NOT_MEASURED)


product_of = Weights.product


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors lie on the CPU")
def test_a_row_that_depends_on_others_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(self: Weights, candidate: Candidate, x: Tensor, y: Tensor, parts: Tensor) -> None:
        product_of(self, candidate, x, y, parts)
        if candidate.bucket == 32 and len(x) > 2:
            y[0] += 1e-3

    monkeypatch.setattr(Weights, "product", product)
    out = Recorder(tmp_path, "B", 60.0)
    row_bits.run(out, replace(CPU, bit_rows=(1, 2, 3)))
    wrong_at = {tuple(each["candidate"]): each["wrong_at"] for each in out.found.of("bits")}
    assert len({key[4] for key in wrong_at}) == 4
    for candidate, counts in wrong_at.items():
        assert counts == ([3] if candidate[4] == 32 else [])


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors lie on the CPU")
def test_a_configuration_that_a_card_has_no_room_for_is_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(self: Weights, candidate: Candidate, x: Tensor, y: Tensor, parts: Tensor) -> None:
        if candidate.bucket == 128:
            raise RuntimeError("out of resource: shared memory")
        product_of(self, candidate, x, y, parts)

    monkeypatch.setattr(Weights, "product", product)
    out = Recorder(tmp_path, "B", 60.0)
    row_bits.run(out, replace(CPU, bit_rows=(1,)))
    assert {each["candidate"][4] for each in out.found.of("bits", holds=True)} == {16, 32, 256}
    assert {each["candidate"][4] for each in out.found.of("not run")} == {128}
    assert out.found.failure == ""


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors lie on the CPU")
def test_what_a_kernel_leaves_unwritten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(self: Weights, candidate: Candidate, x: Tensor, y: Tensor, parts: Tensor) -> None:
        product_of(self, candidate, x[:-1], y[:-1], parts)

    place = Place(TINY, torch.device("cpu"), 90)
    assert all(each.is_right for each in check_linears(place))
    monkeypatch.setattr(Weights, "product", product)
    assert not any(each.is_right for each in check_linears(place))


@pytest.mark.parametrize("can_capture", [True, False])
def test_calls_that_cannot_be_captured_are_timed_as_they_are_launched(
    can_capture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: runs take 2 s, and a capture runs nothing."""
    launched: list[str] = []
    replayed: list[str] = []

    def capture(launch: Callable[[], None]) -> SimpleNamespace:
        if not can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        return SimpleNamespace(replay=lambda: replayed.append("graph"))

    def seconds(run: Callable[[], object]) -> float:
        run()
        return 2.0

    monkeypatch.setattr(timing, "CapturingOnGpu", lambda device: capture)
    monkeypatch.setattr(timing, "event_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = [partial(launched.append, "a"), partial(launched.append, "b")]
    timed = timing.Timer(torch.device("cuda"), 3).time(calls)
    assert (timed.seconds, timed.is_graph) == (1.0, can_capture)
    rounds = 1 if can_capture else 1 + 1 + 3
    assert launched == ["a", "b"] * rounds
    assert len(replayed) == (4 if can_capture else 0)


def test_what_the_sanitizer_finds_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "this is $2"\n[ "$2" = memcheck ] || exit 86\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    out = Recorder(tmp_path, "H", 60.0)
    sanitizer.run(out, GPU)
    found = {each["tool"]: each for each in out.found.of("sanitizer")}
    assert {tool: each["is_clean"] for tool, each in found.items()} == {"memcheck": True, "racecheck": False}
    assert found["racecheck"]["said"] == "this is racecheck\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_and_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "figures")]) == 1
    assert "torch" in (said := capsys.readouterr().err)
    assert "or give --cpu" in said
    assert not (tmp_path / "figures").exists()


def test_parts_end_alone(tmp_path: Path) -> None:
    names = ("raises", "dies", "hangs", "lacks", "works")
    parts = [Part(name, f"support.gpu.parts.{name}", 1.0, name) for name in names]
    run_parts(parts, CPU, tmp_path, 12.0, preload="json", end_s=0.5)
    found = {name: read(tmp_path, name) for name in names}
    assert "ValueError: what it raises" in found["raises"].failure
    assert found["dies"].failure == "its process ended with 9"
    assert found["hangs"].failure.startswith("killed")
    assert all(found[name].of("begun") for name in ("raises", "dies", "hangs"))
    assert (found["lacks"].failure, found["works"].failure) == ("", "")
    assert found["lacks"].lacks == ["what needs nothing_that_is_installed, which is not installed"]
    assert found["works"].of("worked")


def test_a_part_that_gets_no_time_says_so(tmp_path: Path) -> None:
    parts = [Part("F", "support.gpu.parts.works", 1.0, ""), Part("T", "support.gpu.parts.works", 1.0, "")]
    run_parts(parts, CPU, tmp_path, 1e-6, preload="json", end_s=5.0)
    assert read(tmp_path, "F").lacks == ["all of it: the budget is spent"]


def test_a_part_says_once_that_it_is_late(tmp_path: Path) -> None:
    out = Recorder(tmp_path, "X", 0.0)
    assert (out.is_late, out.is_late) == (True, True)
    assert len(read(tmp_path, "X").lacks) == 1


def test_what_fails_is_kept_and_what_follows_goes_on(tmp_path: Path) -> None:
    out = Recorder(tmp_path, "X", 60.0)
    for what in ("one", "two"):
        with out.going_on(what):
            raise ValueError(what)
    out.record("reached")
    failure = read(tmp_path, "X").failure.splitlines()
    assert failure[0].startswith("Traceback")
    assert failure[-2:] == ["one: ValueError('one')", "two: ValueError('two')"]
    assert out.found.of("reached")


def limits(late_s: float) -> dict[str, tuple[float, bool]]:
    """What parts get if all before E together took so much more than their own, and those from E on all they get."""
    left_s, found = BUDGET_S, {}
    for index, part in enumerate(PARTS):
        limit_s, _ = found[part.name] = limit_of(part, PARTS[index + 1 :], left_s, 1.0)
        taken_s = part.seconds if part.name < "E" else limit_s
        left_s -= taken_s + (late_s if part.name == "D" else 0.0)
    return found


def test_steps_are_shortened_before_peers_are_cut() -> None:
    own = {part.name: part.seconds for part in PARTS}
    assert limits(0)["E"] == (own["E"], False)
    assert limits(0)["F"] == (own["F"], False)
    late = limits(50)
    assert late["E"] == (own["E"] - 50, True)
    assert [late[name][0] for name in "FGHT"] == [own[name] for name in "FGHT"]
    later = limits(80)
    assert later["E"] == (own["E"] / 3, True)
    assert own["F"] > later["F"][0] > 0
    assert limits(own["E"] + own["F"])["F"][0] == 0
    assert [limits(110)[name][0] for name in "GHT"] == [own[name] for name in "GHT"]


def test_what_a_part_leaves_over_is_the_next_ones() -> None:
    assert limits(-30)["E"] == (PARTS[5].seconds + 30, False)


def key(bucket: int, tile: RowTiles, *, splits: int = 1, is_dense: bool = False) -> list[Any]:
    fields = (tile.rows, tile.weights, tile.num_warps, tile.num_stages, tile.is_split, tile.gathers)
    return [4096, 4096, 64, splits, bucket, is_dense, *fields]


FEW, OTHER = RowTiles(16, 64, 4, 3, is_split=True), RowTiles(16, 128, 4, 3, is_split=True)
MANY, DENSE = RowTiles(128, 64, 8, 3), RowTiles(128, 128, 8, 3)


def found_of(part: str, *records: tuple[str, Mapping[str, Any]]) -> Found:
    return Found(part, records=list(records))


def product(rows: int, us: float, candidate: list[Any], what: str = "nf4") -> tuple[str, dict[str, Any]]:
    figures = {"shape": [4096, 4096], "rows": rows, "us": us, "candidate": candidate}
    return what, figures if what == "decoded first" else {**figures, "absmax": "nested"}


def bits(candidate: list[Any], *, holds: bool = True) -> tuple[str, dict[str, Any]]:
    return "bits", {"candidate": candidate, "holds": holds}


CARD = ("card", {"sm": 90, "memory_gb": 141.0})


def test_the_fastest_whose_bits_hold_are_chosen() -> None:
    """With two ranges of K one row is a little slower, and many rows are much faster."""
    one, wrong = key(16, FEW), key(16, OTHER)
    many, two, two_many = key(256, MANY), key(16, OTHER, splits=2), key(256, MANY, splits=2)
    decoded = key(256, DENSE, splits=2, is_dense=True)
    run = {
        "0": found_of("0", CARD),
        "B": found_of("B", bits(one), bits(wrong, holds=False), *map(bits, (many, two, two_many, decoded))),
        "C": found_of(
            "C",
            product(1, 10, one),
            product(1, 2, wrong),
            product(1, 11, two),
            product(512, 900, many),
            product(512, 300, two_many),
            product(2048, 1000, two_many),
            product(2048, 1000, many),
            product(512, 400, decoded, "decoded first"),
            product(2048, 800, decoded, "decoded first"),
        ),
    }
    (shape,) = chosen(run)
    assert (shape.shape, shape.block_k, shape.splits, shape.decoded_rows) == ((4096, 4096), 64, 2, 2048)
    assert shape.us == {1: 11, 512: 300, 2048: 800}
    names: dict[str, Any] = {"Mapping": Mapping, **vars(linear_tiles)}
    exec(source(90, [shape]), names)  # where it is put, below the classes
    tiles = names["MEASURED"][90, 4096, 4096]
    assert tiles == linear_tiles.tiles_for(90, 4096, 4096, names["MEASURED"])
    assert (tiles.splits, tiles.nf4[16], tiles.nf4[256], tiles.dense[256]) == (2, OTHER, MANY, DENSE)
    assert tiles.nf4[64] == linear_tiles.tiles_for(90, 4096, 4096, {}).nf4[64]


def line(run: Mapping[str, Found], title: str) -> str:
    (found,) = (each for each in table(run, is_measured=True).splitlines() if each.startswith(title))
    return " ".join(found.split())


def test_a_product_whose_bits_do_not_hold_beats_nobody() -> None:
    own, wrong = key(16, FEW), key(16, OTHER)
    run = {
        "B": found_of("B", bits(own), bits(wrong, holds=False)),
        "C": found_of(
            "C",
            product(1, 10, own),
            product(1, 1, wrong),
            ("gemm_4bit", {"shape": [4096, 4096], "rows": 1, "us": 12.0}),
        ),
    }
    assert line(run, "NF4 linears over gemm_4bit").endswith("1.2x ≥ 1x ≥ 1.3x ok")


def test_small_cards_must_come_nearer_to_their_bandwidth() -> None:
    candidate = key(16, FEW)
    run = {
        "0": found_of("0", ("copy", {"gb_per_s": 1000.0}), CARD),
        "C": found_of("C", product(1, 4096 * 4096 * 0.51587 / 0.6 / 1e6, candidate)),
    }
    title = "NF4 linears, 1 row"
    assert line(run, title).endswith("0.6x ≥ 0.55x ≥ 0.7x ok")
    run["0"] = found_of("0", ("copy", {"gb_per_s": 1000.0}), ("card", {"sm": 89, "memory_gb": 24.0}))
    assert line(run, title).endswith("0.6x ≥ 0.75x ≥ 0.85x MISSED")


def decode(rows: int, adapters: int, tokens_per_s: float, **others: float) -> tuple[str, dict[str, Any]]:
    figures = {"on": "strict", "rows": rows, "adapters": adapters, "tokens_per_s": tokens_per_s}
    return "decode", {"host_share": 0.02, **figures, **others}


def test_adapters_are_held_against_the_bytes_that_they_add() -> None:
    model = {"step_bytes": 600, "context": 10, "kv_bytes_per_token": 1.25, "adapter_bytes": 25}
    run = {
        "E": found_of("E", ("model", model), decode(32, 0, 1000.0), decode(32, 32, 500.0)),
        "F": found_of(
            "F",
            ("transformers", {"rows": 32, "tokens_per_s": 100.0}),
            ("peft, switched", {"tokens_per_s": 30.0}),
        ),
    }
    # 600 + 400 bytes without, and 32 · 25 more.
    assert line(run, "decode on 32 adapters").endswith("0.9x ≥ 0.85x ≥ 0.95x ok")
    assert line(run, "decode, 32 rows, the same").endswith("10x ≥ 8x ≥ 15x ok")
    assert line(run, "decode, 32 rows on 32 adapters").endswith("16.7x ≥ 10x ≥ 25x ok")
    assert line(run, "a step's wait for the host").endswith("2% ≤ 10% ≤ 3% wanted")
    assert line(run, "decode on 8 adapters").endswith(NOT_MEASURED)


class Stub:
    """A model that notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.token_ids: list[list[int]] = []

    def forward(self, plan: StepPlan, cache: object, adapters: object) -> Stub:
        self.token_ids.append(plan.token_ids.tolist())
        self.calls.append(f"launch {len(self.token_ids) - 1}")
        return self

    def finish(self, wants: Wants) -> StubPending:
        assert wants.choices.num_rows == len(self.token_ids[-1])
        return StubPending(self, len(self.token_ids) - 1)


class StubPending:
    def __init__(self, model: Stub, step: int) -> None:
        self.model, self.step = model, step

    def result(self) -> Outcome:
        self.model.calls.append(f"collect {self.step}")
        return Outcome([], [], np.empty((0, 0), np.float32), frozenset())


def stubbed(num_ahead: int) -> Stub:
    """What decoding two sequences for three steps asks of a model, after one step that warms up."""
    scale = replace(CPU, num_warm=1, num_steps=3)
    model = make_model(scale.shape, torch.device("cpu"))
    engine = Engine(open_strict(scale, model), model, scale, 1)
    stub = Stub()
    engine.model, engine.num_ahead = stub, num_ahead
    assert len(engine.decode(2, 6, 3).step_s) == 3
    return stub


def test_a_step_is_collected_before_the_next_one_is_launched() -> None:
    stub = stubbed(0)
    assert stub.calls == [f"{what} {step}" for step in range(4) for what in ("launch", "collect")]
    assert min(token for ids in stub.token_ids for token in ids) >= 0


def test_a_backend_that_runs_ahead_is_given_steps_whose_tokens_are_not_known_yet() -> None:
    stub = stubbed(1)
    assert stub.calls == [
        "launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "launch 3", "collect 2", "collect 3",
    ]  # fmt: skip
    assert stub.token_ids[1:] == [[-1, -2]] * 3


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors lie on the CPU")
def test_what_would_be_a_graph_is_launched_again() -> None:
    scale = replace(CPU, num_warm=0, num_steps=3)
    model = make_model(scale.shape, torch.device("cpu"))
    engine = Engine(open_launched(scale, model), model, scale, 2)
    assert len(engine.decode(2, 6, 3).step_s) == 3


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors lie on the CPU")
@pytest.mark.parametrize(("rows", "slot"), [(2, 1), (17, 0)])
def test_a_step_that_is_compiled_in_advance_is_one_that_runs(rows: int, slot: int) -> None:
    launch_step(StepJob(TINY, rows, slot), 90)


def test_what_decides_settings_is_told_beside_the_goals() -> None:
    nested, plain = product(1, 12, key(16, FEW)), product(1, 10, key(16, FEW))
    plain[1]["absmax"] = "plain"
    launched = decode(32, 0, 400.0)
    launched[1]["on"] = "strict, launched"
    run = {"C": found_of("C", nested, plain), "E": found_of("E", decode(32, 0, 1000.0), launched)}
    shown = table(run, is_measured=True).splitlines()
    assert "absmaxes in float32 over nested ones, rows 1 to 64: 1.2x" in shown
    assert "graphs over launches, decode of 32 rows: 2.5x" in shown
    assert not [each for each in shown if "decode of 1 row:" in each]
