"""The profile of a step: what its parts cost, by hand; the clocks around them; and a whole run on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.profile.costs import CHOOSING, KERNELS, Cost, step_costs
from benchmarks.profile.loops import CHAINS, INTEGER_CHAINS, multiply, multiply_integers, read
from benchmarks.profile.rates import Rates, RatesSession
from benchmarks.profile.session import PARTS, Profile
from benchmarks.profile.tables import step_table
from benchmarks.profile.timing import TimedBackend, TimedModel, parts_of
from benchmarks.workload import Case

from manyhats.engine.backends.cpu import columns, wide
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.model.architecture import (
    Architecture,
    Around,
    Attention,
    Block,
    Embedding,
    Experts,
    FeedForward,
    Head,
    Norm,
)
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Runner, load_tiny, random_ids, random_lora

ROOT = Path(__file__).parents[1]


def block(window: int | None) -> Block:
    """Queries of 64 values, keys of 32; 8192 + 4096 + 16384 + 8192 weights."""
    norm = Norm(1e-5)
    return Block(
        hidden_size=64,
        attention=Attention(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, window=window),
        around_attention=Around(before=norm),
        feed_forward=FeedForward(width=128, activation="silu"),
        around_feed_forward=Around(before=norm),
    )


ARCHITECTURE = Architecture(
    model_type="llama",
    max_context_length=64,
    embedding=Embedding(num_tokens=100, size=64),
    blocks=(block(None), block(4)),
    final_norm=Norm(1e-5),
    head=Head(is_tied=True, size=64),
)


def plan(*slots: int) -> StepPlan:
    """One sequence decodes behind nine tokens; another's three rows end at its fifth. Both need logits."""
    return StepPlan(
        token_ids=int32([1, 2, 3, 4]),
        positions=int32([9, 2, 3, 4]),
        cells=np.array([9, 18, 19, 20]),
        query_start=int32([0, 1, 4]),
        context_len=int32([10, 5]),
        block_tables=int32([[0], [1]]),
        row_slots=int32(slots),
        logit_rows=int32([0, 3]),
    )


def test_costs_are_those_counted_by_hand() -> None:
    # NF4: of 4096 weights, 2048 bytes of codes, 64 of scales, 1 of their scales. Two blocks, four rows.
    assert step_costs(ARCHITECTURE, plan(0, 0, 0, 0), rank=2) == {
        "qkv": Cost(2 * 2 * 2113, 2 * 2 * 4 * 8192),
        "o": Cost(2 * 2113, 2 * 2 * 4 * 4096),
        "gate_up": Cost(2 * 4 * 2113, 2 * 2 * 4 * 16384),
        "down": Cost(2 * 2 * 2113, 2 * 2 * 4 * 8192),
        "head": Cost(2 * 6400 + 2 * 400, 2 * 2 * 6400),
        # Cells of 64 values: 10 + 5, and behind a window of four 4 + 5. Seen: 10 + 3 + 4 + 5, and 4 + 3 + 4 + 4.
        "attention": Cost(2 * 64 * (15 + 9), 4 * 64 * (22 + 15)),
        "deltas": Cost(),
        # The first norm, the copy, and the two sums with norms of each block, of 64 values a row.
        "norms": Cost(cached_bytes=4 * 64 * (2 * 4 + 2 * 2 + 2 * 2 * 4 * 4)),
        # 96 values read and written, 32 read; 64 written to cells.
        "rotation": Cost(2 * 4 * 2 * 64, cached_bytes=2 * 4 * 4 * (2 * 96 + 32)),
        "gate": Cost(cached_bytes=2 * 4 * 4 * 3 * 128),
        CHOOSING: Cost(2 * 400),
    }
    in_eight_bits = step_costs(ARCHITECTURE, plan(0, 0, 0, 0), rank=2, head_bytes=1.25)
    assert in_eight_bits["head"] == Cost(1.25 * 6400 + 2 * 400, 2 * 2 * 6400)


def test_of_experts_as_many_are_read_as_rows_can_have() -> None:
    mixture = replace(block(None).feed_forward, experts=Experts(7, 2, renormalizes=True))
    architecture = replace(ARCHITECTURE, blocks=(replace(block(None), feed_forward=mixture),))
    plain = step_costs(replace(ARCHITECTURE, blocks=(block(None),)), plan(0, 0, 0, 0), rank=2)
    costs = step_costs(architecture, plan(0, 0, 0, 0), rank=2)
    # Four rows, two experts each: all seven may be read. The router, of bfloat16, is counted with the first linears.
    assert costs["gate_up"] == Cost(7 * 4 * 2113 + 2 * 7 * 64, 2 * 2 * 4 * 16384 + 2 * 4 * 7 * 64)
    assert costs["down"] == Cost(7 * 2 * 2113, 2 * 2 * 4 * 8192)
    assert costs["gate"] == Cost(cached_bytes=4 * (8 * 3 * 128 + 4 * 8 * 64 + 4 * 64))
    others = costs.keys() - {"gate_up", "down", "gate"}
    assert {part: costs[part] for part in others} == {part: plain[part] for part in others}


@pytest.mark.parametrize(
    ("slots", "num_adapters", "num_rows"),
    [((1, 0, 0, 0), 1, 1), ((1, 1, 1, 1), 1, 4), ((1, 2, 2, 2), 2, 4)],
)
def test_an_adapter_is_read_once_and_computed_for_each_of_its_rows(
    slots: tuple[int, ...], num_adapters: int, num_rows: int
) -> None:
    costs = step_costs(ARCHITECTURE, plan(*slots), rank=2)
    # Inputs and outputs of q, k, v; o; gate, up; down, in both blocks.
    num_values = 2 * 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    assert costs["deltas"] == Cost(2 * num_adapters * num_values, 2 * num_rows * num_values)


def test_biases_are_read() -> None:
    biased = Block(
        hidden_size=64,
        attention=ARCHITECTURE.attention,
        around_attention=Around(),
        feed_forward=FeedForward(128, "silu"),
        around_feed_forward=Around(),
        biased=frozenset({"q_proj", "down_proj"}),
    )
    own = Architecture(
        model_type="llama",
        max_context_length=64,
        embedding=Embedding(100, 64),
        blocks=(biased,),
        final_norm=Norm(1e-5),
        head=Head(is_tied=True, size=64),
    )
    costs = step_costs(own, plan(0, 0, 0, 0), rank=2)
    assert [costs[part].num_bytes for part in ("qkv", "o", "down")] == [4226 + 4 * 64, 2113, 4226 + 4 * 64]


def test_a_limit_is_that_of_what_takes_longer() -> None:
    assert Cost(num_bytes=100, flops=100).limit_s(read_rate=10, flop_rate=20) == 10
    assert Cost(num_bytes=100, flops=100).limit_s(read_rate=20, flop_rate=10) == 10


def test_loops_do_what_is_counted() -> None:
    sums = np.zeros(2, dtype=np.float32)
    read(np.arange(256, dtype=np.float32), sums, 2)
    assert sums.tolist() == [sum(range(128)), sum(range(128, 256))]
    start = np.full(CHAINS * wide.LANES, 0.5, dtype=np.float32)
    multiply(start, sums, 3, 2)  # 0.5 → 0.75 → 0.875 → 0.9375
    assert sums.tolist() == [0.9375 * CHAINS * wide.LANES] * 2


def test_the_loop_of_integers_computes_what_it_says() -> None:
    sums = np.zeros(2, dtype=np.int32)
    multiply_integers(sums, 2, 2)
    # Chains begin at 1, 2, …, whose upper halves are 0: each step is s → s + 3 · s.
    assert sums.tolist() == [16 * sum(range(1, INTEGER_CHAINS + 1))] * 2


def test_rates_of_a_machine_are_positive() -> None:
    session = RatesSession(1, 2**16, 0.01)
    rates = session.measure()
    assert rates.read_bytes > 0
    assert rates.flops >= rates.float32_flops > 0
    assert session.int16_flops(64) > 0


def test_each_linear_is_told_by_its_deltas(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "nf4")
    rows, _ = Runner(model, CpuBackend(1)).model.instructions
    counts = Counter(parts_of(rows))
    assert counts.keys() == set(KERNELS)
    num_layers = model.architecture.num_layers
    assert {part: counts[part] for part in ("qkv", "o", "gate_up", "down", "attention", "head")} == {
        **dict.fromkeys(("qkv", "o", "gate_up", "down", "attention"), num_layers),
        "head": 1,
    }


def test_each_linear_of_experts_is_told_by_what_is_around_it(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", "qwen3_moe", mlp_only_layers=[1]), "nf4")
    rows, _ = Runner(model, CpuBackend(1)).model.instructions
    parts = parts_of(rows)
    linears = [
        part
        for part, row in zip(parts, rows, strict=True)
        if row[columns.INSTRUCTION] in (columns.LINEAR, columns.EXPERT_LINEAR)
    ]
    of_layers = ["qkv", "o", "gate_up", "gate_up", "down", "qkv", "o", "gate_up", "down"]
    assert linears == [*of_layers, "head"]
    assert set(parts) == set(KERNELS)


def test_a_timed_model_accounts_for_its_steps_and_computes_as_before(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "nf4")
    lora = {1: random_lora(model.description, 1)}
    prompts = [Prompt(random_ids(i, 1, TINY_VOCAB_SIZE), slot=i, new_tokens=3) for i in range(2)]
    plain = Runner(model, CpuBackend(1), adapters=lora)
    backend = TimedBackend(1, is_exact=True)
    timed = Runner(model, backend, adapters=lora)
    assert isinstance(timed.model, TimedModel)
    expected, found = plain.run(prompts), timed.run(prompts)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert len(backend.steps) == 4  # the last token is run too
    for step in backend.steps:
        parts = step.parts()
        assert parts.keys() == set(KERNELS)
        assert min(parts.values()) > 0
        assert step.forward_s > sum(parts.values())
        assert step.choosing_s > 0


def test_a_timed_model_computes_no_prompts(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5), "nf4")
    backend = TimedBackend(1, is_exact=True)
    runner = Runner(model, backend)
    runner.run([Prompt(random_ids(0, 20, TINY_VOCAB_SIZE), new_tokens=3)])
    assert [step.plan.context_len.tolist() for step in backend.steps] == [[21], [22], [23]]


def test_a_table_shows_which_share_of_the_limit_is_reached() -> None:
    profile = Profile(
        parts={**dict.fromkeys(PARTS, 0.0), "head": 0.004, "Python in the step": 0.001},
        step_s=0.005,
        costs={"head": Cost(num_bytes=20e6, flops=1e9)},
        num_left=0,
        num_steps=3,
    )
    shown = step_table(Case(8, 8), 128, profile, Rates(20e9, 500e9, None), 0.002, None).splitlines()
    assert shown[0] == "8 sequences behind 128 tokens, 8 LoRA"
    assert [line.split() for line in shown[1:]] == [
        ["ms", "of", "the", "step", "MB", "Gflop", "limit,", "ms", "reached"],
        ["head", "4.000", "80.0", "%", "20", "1", "2.000", "50.0", "%"],
        ["Python", "in", "the", "step", "1.000", "20.0", "%"],
        ["step", "5.000", "20", "1", "2.000", "40.0", "%"],
        ["choosing,", "top_p", "0.9", "instead", "2.000", "40.0", "%"],
    ]


def profiled(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.profile", "--quick", "--threads", "1", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Mapping[str, Any]]:
    """The tables and the JSON of a quick run."""
    directory = tmp_path_factory.mktemp("profile")
    model = make_checkpoint(directory / "model")
    path = directory / "new" / "profile.json"
    run = profiled(
        "--model", str(model), "--json", str(path), "--sequences", "3,1", "--contexts", "48,1000000"
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_run_shows_a_table_for_each_case_and_what_did_not_fit(
    finished: tuple[str, Mapping[str, Any]],
) -> None:
    shown, _ = finished
    for count in ("1 sequence", "3 sequences"):
        assert f"{count} behind 48 tokens, base\n" in shown
        assert f"Left out: {count} behind 1000000 tokens, base; the model's context is" in shown
    assert "3 sequences behind 48 tokens, 3 LoRA\n" in shown
    assert "threads: 1; reading: " in shown


@pytest.mark.slow
def test_run_accounts_for_all_of_a_step(finished: tuple[str, Mapping[str, Any]]) -> None:
    _, document = finished
    assert [each["case"] for each in document["profiles"]] == ["base/1", "lora/1x1", "base/3", "lora/3x3"]
    for each in document["profiles"]:
        assert each["num_steps"] == 4
        assert each["parts"].keys() == set(PARTS)
        assert all(part["seconds"] >= 0 for part in each["parts"].values())
        assert 0 < each["limit_s"] < each["step_s"]
        assert (each["parts"]["deltas"]["bytes"] > 0) == each["case"].startswith("lora")
        assert each["choosing_top_p_s"] > 0
        assert sys.platform != "linux" or each["grpc_event_loop_s"] > 0
    assert document["rates"].keys() == {"read_bytes", "float32_flops", "int16_flops"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--sequences", "1,none"), "'none' is not a number from 1"),
        (("--contexts", "0"), "'0' is not a number from 1"),
        (("--steps", "29"), "at most 28 steps, not 29"),
        (("--threads", "-1"), "'-1' is not a number from 1"),
    ],
)
def test_bad_options_are_named(options: tuple[str, ...], problem: str) -> None:
    run = profiled(*options)
    assert run.returncode == 2
    assert problem in run.stderr
