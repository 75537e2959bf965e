"""Steps that are recorded once and replayed: the same bits as launched ones, whatever the steps are."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.backend import CudaBackend
from manyhats.engine.backends.cuda.graphs import MAX_COPIES, MAX_SHAPES, ROWS, Capture, Graph, Graphs, Shape
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.wants import NO_TARGETS, Wants
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.progress import no_progress
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.sampler import SamplingRow, choices_of
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.gpu.recording import Recorder
from support.harnesses.engine import Prompt, Ran, Runner, load_tiny, random_ids, random_lora

LIMITS = Limits(max_rows=32, max_sequences=8, adapter_bytes=4 << 20, memory_fraction=0.9)


RUNTIME = runtime_on(torch.device(DEVICE))


def run_shape(graphs: Graphs, rows: int, launch: Callable[[], None]) -> None:
    shape = Shape(rows, 1, 64, Acting())
    graphs.uploads(shape)
    graphs.run(shape, launch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("graphs") / "tiny", seed=5), "nf4")


def run(model: LoadedModel, prompts: list[Prompt], capture: Capture | None) -> list[Ran]:
    adapters = {slot: random_lora(model.description, slot, rank=4 * slot) for slot in (1, 2)}
    backend = CudaBackend(DEVICE, LIMITS, capture)
    runner = Runner(model, backend, adapters=adapters, cache_dtype="bfloat16", num_blocks=40)
    return runner.run(prompts, max_tokens=16)


def test_replayed_steps_have_the_bits_of_launched_ones(model: LoadedModel) -> None:
    prompts = [
        Prompt(random_ids(i, 2 + 3 * i, TINY_VOCAB_SIZE), slot=i % 3, new_tokens=4 + i, joins=2 * i)
        for i in range(3)
    ]
    recorder = Recorder()
    replayed, launched = run(model, prompts, recorder), run(model, prompts, None)
    assert recorder.num_replays >= 3
    for ran, other in zip(replayed, launched, strict=True):
        assert ran.token_ids == other.token_ids
        assert torch.equal(ran.stacked, other.stacked)


def test_a_mixtures_rows_are_sent_anew_in_each_replay(tmp_path: Path) -> None:
    """Which experts rows go to, and what adapters do there, is all on the device."""
    model = load_tiny(make_checkpoint(tmp_path / "tiny", "mixtral", seed=5))
    prompts = [Prompt(random_ids(i, 3, TINY_VOCAB_SIZE), slot=i, new_tokens=3) for i in range(2)]
    recorder = Recorder()
    replayed, launched = run(model, prompts, recorder), run(model, prompts, None)
    assert recorder.num_replays >= 1
    for ran, other in zip(replayed, launched, strict=True):
        assert torch.equal(ran.stacked, other.stacked)


def decode_plan(token_ids: list[int], position: int) -> StepPlan:
    """One more token of each of some sequences, a block of 16 each."""
    count = len(token_ids)
    return StepPlan(
        token_ids=int32(token_ids),
        positions=np.full(count, position, np.int32),
        cells=np.arange(count, dtype=np.int64) * 16 + position,
        query_start=int32(range(count + 1)),
        context_len=np.full(count, position + 1, np.int32),
        block_tables=int32([[each] for each in range(count)]),
        row_slots=int32([0] * count),
        logit_rows=int32(range(count)),
    )


@pytest.mark.parametrize("records", [False, True])
def test_a_plan_may_name_tokens_of_the_step_before(model: LoadedModel, records: bool) -> None:
    def wants(order: list[int]) -> Wants:
        rows = [SamplingRow(params=SamplingParams()) for _ in order]
        choices = choices_of(rows, order, TINY_VOCAB_SIZE)
        return Wants(choices, NO_TARGETS, int32(range(2)))

    found = []
    for names_them in (False, True):
        backend = CudaBackend(DEVICE, LIMITS, Recorder() if records else None)
        prepared = backend.prepare(model.architecture, model.weights)
        cache = backend.new_cache(model.architecture, 16, "bfloat16", 1 << 16)
        slots = backend.new_adapters(model.architecture, 2, "bfloat16")
        for _ in range(3):  # until it is recorded
            pending = prepared.forward(decode_plan([5, 9], 0), cache, slots).finish(wants([1, 0]))
        # Choice 0 is row 1's.
        tokens = [token.id for token in pending.result().tokens]
        ids = [-2, -1] if names_them else [tokens[1], tokens[0]]
        outcome = prepared.forward(decode_plan(ids, 1), cache, slots).finish(wants([0, 1])).result()
        found.append(outcome.whole)
    np.testing.assert_array_equal(found[0], found[1])


def test_decode_steps_of_the_base_are_recorded_at_the_start(model: LoadedModel) -> None:
    recorder, limits = Recorder(), replace(LIMITS, max_rows=3, max_sequences=3)
    backend = CudaBackend(DEVICE, limits, recorder)
    prepared = backend.prepare(model.architecture, model.weights)
    cache = backend.new_cache(model.architecture, 16, "bfloat16", 1 << 16)
    slots = backend.new_adapters(model.architecture, 2, "bfloat16")
    prepared.warm_up(cache, slots, 1, no_progress)
    assert len(recorder.graphs) == 2, "of one row and of two: four do not fit a step"


def test_what_cannot_be_recorded_goes_on_being_launched() -> None:
    def refuse(launch: Callable[[], None]) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, launched = Graphs(refuse, RUNTIME), []
    for step in range(4):
        run_shape(graphs, 1, lambda step=step: launched.append(step))  # type: ignore[misc]
    assert launched == [0, 1, 2, 3]
    assert graphs.num_replays == 0


def test_after_a_few_failures_nothing_more_is_recorded() -> None:
    asked = []

    def refuse(launch: Callable[[], None]) -> Graph:
        asked.append(launch)
        raise RuntimeError("out of memory")

    graphs = Graphs(refuse, RUNTIME)
    for rows in range(1, 9):
        for _ in range(3):
            run_shape(graphs, rows, lambda: None)
    assert len(asked) == 3


def test_the_shape_that_no_step_had_for_the_longest_makes_room() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, RUNTIME)
    for rows in range(1, MAX_SHAPES + 2):  # one more than there is room for: the first goes
        for _ in range(2):
            run_shape(graphs, rows, lambda: None)
    assert len(recorder.graphs) == MAX_SHAPES + 1
    run_shape(graphs, 2, lambda: None)
    assert len(recorder.graphs) == MAX_SHAPES + 1, "is still there"
    for _ in range(2):
        run_shape(graphs, 1, lambda: None)
    assert len(recorder.graphs) == MAX_SHAPES + 2, "was recorded anew"


def test_graphs_of_other_memory_are_not_replayed() -> None:
    recorder, first, second = Recorder(), object(), object()
    graphs = Graphs(recorder, RUNTIME)
    for memory, count in ((first, 3), (second, 1), (first, 1)):
        for _ in range(count):
            graphs.use(memory)
            run_shape(graphs, 1, lambda: None)
    assert (len(recorder.graphs), graphs.num_replays) == (1, 2)


def test_a_shape_holds_the_step_and_little_more() -> None:
    plan = decode_plan([3] * 5, 7)
    shape = Shape.of(plan, Acting(rank=17, outputs=frozenset(["qkv"])))
    assert shape == Shape(8, 8, 64, Acting(rank=32, outputs=frozenset(["qkv"])))
    assert list(ROWS) == sorted(set(ROWS))
    rows = int32([0])
    for other in (
        replace(plan, embeddings=(rows, np.zeros((1, 4), np.float32))),
        replace(plan, hidden_rows=rows),
        replace(plan, block_copies=((0, 1),) * (MAX_COPIES + 1)),
        decode_plan([3] * 513, 0),
    ):
        assert Shape.of(other, Acting()) is None
    assert Shape.of(plan, Acting(head_rows=3)) is None
