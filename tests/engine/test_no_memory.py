"""Where there is no memory, one request is told so and may be sent again; the others come to the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from manyhats.adapters.primitives import KVPrefix
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.constraint import Constraint
from manyhats.engine.errors import NoMemoryError, is_out_of_memory
from manyhats.engine.loop.generation import Generation
from manyhats.engine.output import ScoreOutput
from manyhats.engine.sampling.grammars import Grammars
from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from support.factories.tiny_models import make_checkpoint
from support.harnesses.backends import default_model
from support.harnesses.engine import (
    collect,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
    until,
)
from support.harnesses.engine_loop import Loop, prompt, score_request

TORCH = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 79 GiB"
)
KINDS = [
    MemoryError(),
    TORCH,
    CUDA,
    OSError(12, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
]


def real_torch_error() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    return caught.value


def test_what_says_that_there_is_no_memory_is_known() -> None:
    assert all(is_out_of_memory(error) for error in (*KINDS, real_torch_error()))
    for other in (RuntimeError("a bug"), OSError(2, "No such file"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


def failing_at(loop: Loop, numbers: set[int], error: BaseException) -> None:
    """Have the forwards with these numbers, from 0, fail."""
    calls = iter(range(10_000))

    def fail(_: Any) -> None:
        if next(calls) in numbers:
            raise error

    loop.decoder.before_forward = fail


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_a_step_without_memory_ends_its_newest_request_alone(
    loop: Loop, at: int, error: BaseException
) -> None:
    failing_at(loop, {at}, error)
    for seed in range(3):
        loop.generate(str(seed), make_request(prompt(seed), new_tokens=12, accepted_s=float(seed)))
    loop.score("score", score_request(prompt(7), [[7, 8], [9, 8]], accepted_s=-1.0))
    with capture_logs() as logs:
        loop.drain()
    assert [log["event"] for log in logs] == ["there was no memory for a request"]
    shed = [name for name in loop.events if isinstance(loop.events[name][-1].payload, NoMemoryError)]
    assert len(shed) == 1
    for seed in range(3):
        if str(seed) not in shed:
            assert loop.token_ids(str(seed)) == loop.decoder.greedy(prompt(seed), 12)
    if at != 0:  # by then all have begun
        assert shed == ["2"]
    assert isinstance(loop.last("score"), ScoreOutput)


def test_requests_are_shed_one_by_one_until_a_step_has_memory_and_the_engine_lives_on(loop: Loop) -> None:
    def fail(plan: Any) -> None:
        if plan.query_start.size - 1 > 2:
            raise MemoryError

    loop.decoder.before_forward = fail
    for round_number in range(5):  # many more failures in a row than an engine survives of another kind
        for seed in range(6):
            request = make_request(prompt(seed, 2), new_tokens=6, accepted_s=float(seed))
            loop.generate(f"{round_number} {seed}", request)
        loop.drain()
        for seed in range(6):
            name = f"{round_number} {seed}"
            if seed < 2:
                assert loop.token_ids(name) == loop.decoder.greedy(prompt(seed, 2), 6)
            else:
                assert isinstance(loop.error(name), NoMemoryError)


def test_one_that_never_has_memory_ends_and_others_follow(loop: Loop) -> None:
    failing_at(loop, {0}, MemoryError())
    loop.generate("alone", make_request(prompt(1), new_tokens=5))
    loop.drain()
    assert isinstance(loop.error("alone"), NoMemoryError)
    loop.generate("next", make_request(prompt(1), new_tokens=5))
    loop.drain()
    assert loop.token_ids("next") == loop.decoder.greedy(prompt(1), 5)


@pytest.mark.parametrize("at", range(0, 12, 3))
def test_a_step_that_is_undone_loses_nothing_that_began_in_it(loop: Loop, at: int) -> None:
    """Copies of shared blocks, cached prefixes and preempted sequences among them."""
    failing_at(loop, {at, at + 1, at + 5}, MemoryError())
    shared = prompt(9, 10)
    for index in range(8):
        request = make_request([*shared, 5 + index], new_tokens=30, accepted_s=float(index))
        loop.generate(str(index), request)
    loop.score("score", score_request(shared, [[token, 5, 6] for token in range(3, 12)], accepted_s=-1.0))
    loop.drain()
    shed = {name for name in loop.events if isinstance(loop.events[name][-1].payload, NoMemoryError)}
    # What runs ahead of a step that is undone is not asked whether it had memory.
    assert len(shed) == 3 if loop.ahead is None else shed
    for index in range(8):
        if str(index) not in shed:
            assert loop.token_ids(str(index)) == loop.decoder.greedy([*shared, 5 + index], 30)
    assert isinstance(loop.last("score"), ScoreOutput)


def test_virtual_tokens_of_a_step_that_is_undone_are_written_again() -> None:
    import torch

    from manyhats.engine.scheduling.schedule import SchedulerConfig

    scheduler = Scheduler(SchedulerConfig(max_num_sequences=4), BlockAllocator(16, 4))
    virtual = VirtualTokens(KVPrefix(torch.zeros(1, 6, 1, 4), torch.zeros(1, 6, 1, 4), 0))
    sequences = [
        Sequence(id=str(i), token_ids=[0] * 6 + [7, 8], max_num_tokens=12, virtual=virtual) for i in range(2)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    schedule = scheduler.schedule()
    assert len(schedule.prefix_fills) == 1
    scheduler.undo(schedule)
    assert scheduler.num_running == 0
    assert scheduler.allocator.num_used == 0
    again = scheduler.schedule()
    assert len(again.prefix_fills) == 1
    assert {chunk.sequence.id for chunk in again.chunks} == {"0", "1"}


class Short(Generation):
    """Has no memory for its third token."""

    def _take_token(self, *arguments: Any) -> Any:
        if self._sequence.num_output_tokens == 2:
            raise MemoryError
        return super()._take_token(*arguments)


def test_a_request_that_runs_out_of_memory_by_itself_ends_alone(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyhats.engine.residency.lease import Lease

    loop.add(Short("short", make_request(prompt(1), new_tokens=9), Lease(), loop.serving))
    loop.generate("other", make_request(prompt(2), new_tokens=9))
    loop.drain()
    assert isinstance(loop.error("short"), NoMemoryError)
    assert loop.token_ids("other") == loop.decoder.greedy(prompt(2), 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("memory") / "tiny", seed=8))


async def test_steps_of_a_real_model_without_memory_shed_one_request_each(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = default_model().forward, iter(range(10_000))
    fails: set[int] = set()

    def sometimes(*arguments: Any) -> Any:
        if next(calls) in fails:
            raise TORCH
        return forward(*arguments)

    async with running_engine(model, {"a": random_lora(model.description, 1)}) as engine:
        requests = [
            make_request(random_ids(seed, 30, 300), make_record("a") if seed % 2 else None, new_tokens=12)
            for seed in range(6)
        ]
        alone = [(await collect(engine, request)).tokens for request in requests]
        monkeypatch.setattr(default_model(), "forward", sometimes)
        fails |= {2, 7}
        results: list[Any] = await asyncio.gather(
            *(collect(engine, request) for request in requests), return_exceptions=True
        )
        assert sum(isinstance(result, NoMemoryError) for result in results) == 2
        for result, expected in zip(results, alone, strict=True):
            assert isinstance(result, NoMemoryError) or result.tokens == expected
        assert engine.is_alive
        await until(lambda: engine.stats.kv_blocks_used == 0 and not engine.in_use(make_record("a")))


async def test_an_adapter_that_there_is_no_memory_for_fails_those_who_wait_for_it_and_loads_later(
    model: LoadedModel,
) -> None:
    """In reading, lowering or packing, which are one work on a loader's thread."""
    left = iter([MemoryError(), TORCH])

    def load(record: Any) -> Any:
        if record.task_id == "a" and (error := next(left, None)) is not None:
            raise error
        return random_lora(model.description, 1)

    async with running_engine(model, load) as engine:
        request = make_request(random_ids(1, 9, 300), make_record("a"))
        other = await collect(engine, make_request(random_ids(1, 9, 300), make_record("b")))
        for _ in range(2):
            with pytest.raises((MemoryError, RuntimeError)) as caught:
                await collect(engine, request)
            assert is_out_of_memory(caught.value)
        assert (await collect(engine, request)).tokens == other.tokens


async def test_a_grammar_that_there_is_no_memory_for_fails_its_request_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check: Callable[..., None] = Grammars._check
    left = iter([MemoryError(), OSError(12, "Cannot allocate memory")])

    def sometimes(*arguments: Any) -> None:
        if (error := next(left, None)) is not None:
            raise error
        check(*arguments)

    monkeypatch.setattr(Grammars, "_check", sometimes)
    constraint = Constraint("regex", "[ab]{4}")
    async with running_engine(model) as engine:
        running = asyncio.create_task(collect(engine, make_request(random_ids(1, 9, 300), new_tokens=90)))
        for _ in range(2):
            with pytest.raises((MemoryError, OSError)) as caught:
                await collect(engine, make_request(random_ids(2, 9, 300), constraint=constraint))
            assert is_out_of_memory(caught.value)
        answer = await collect(engine, make_request(random_ids(2, 9, 300), constraint=constraint))
        assert set(answer.text) <= set("ab")
        assert len((await running).tokens) == 90
