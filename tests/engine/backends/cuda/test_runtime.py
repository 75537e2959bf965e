"""The runtimes that tests use: the CPU's does everything at once, the fake one as late as it may."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.runtime import CpuRuntime, runtime_on
from support.fakes.fake_runtime import POISON, FakeRuntime, LifetimeError

SEEDS = range(20)


def bytes_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_on_the_cpu_a_copy_is_done_on_return() -> None:
    runtime = runtime_on(torch.device("cpu"))
    assert isinstance(runtime, CpuRuntime)
    memory, there = runtime.host_memory(3), torch.zeros(3, dtype=torch.uint8)
    memory.array[:] = (1, 2, 3)
    event, stream = runtime.new_event(), runtime.new_stream()
    runtime.copy(there, memory.tensor, stream)
    event.record(stream)
    stream.wait(event)
    event.synchronize()
    assert event.query()
    assert there.tolist() == [1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_comes_to_the_host_is_there_after_its_event_and_may_not_be_read_before(seed: int) -> None:
    runtime = FakeRuntime(seed)
    memory, event = runtime.host_memory(3), runtime.new_event()
    seen = memory.array
    runtime.copy(memory.tensor, bytes_of(1, 2, 3))
    event.record()
    assert list(seen) == [POISON] * 3, "whether or not the copy has run"
    with pytest.raises(LifetimeError):
        _ = memory.array
    event.synchronize()
    assert list(memory.array) == [1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_event_of_what_was_launched_before_a_copy_says_nothing_of_it(seed: int) -> None:
    runtime = FakeRuntime(seed)
    memory, event = runtime.host_memory(1), runtime.new_event()
    event.record()
    runtime.copy(memory.tensor, bytes_of(1))
    event.synchronize()
    with pytest.raises(LifetimeError):
        _ = memory.array


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_that_a_copy_reads_may_be_written_once_the_host_knows_that_it_is_done(seed: int) -> None:
    runtime = FakeRuntime(seed)
    memory, event, there = runtime.host_memory(1), runtime.new_event(), bytes_of(0)
    memory.array[:] = 5
    runtime.copy(there, memory.tensor)
    event.record()
    with pytest.raises(LifetimeError):
        _ = memory.array
    while not event.query():
        runtime.launch(None)
    memory.array[:] = 6
    runtime.finish()
    assert there.tolist() == [5]


def test_a_source_that_is_rewritten_behind_the_runtime_s_back_is_noticed() -> None:
    def is_noticed(seed: int) -> bool:
        runtime = FakeRuntime(seed)
        memory, there = runtime.host_memory(1), bytes_of(0)
        array = memory.array
        array[:] = 5
        runtime.copy(there, memory.tensor)
        array[:] = 6
        try:
            runtime.finish()
        except LifetimeError:
            return True
        return there.tolist() != [5]

    assert any(is_noticed(seed) for seed in SEEDS)


def order_of(seed: int) -> tuple[int, ...]:
    """In which two operations of one stream, and two of another, run."""
    runtime, order = FakeRuntime(seed), list[int]()
    stream = runtime.new_stream()
    for number in (1, 2):
        runtime.launch(partial(order.append, number))
        runtime.launch(partial(order.append, -number), stream=stream)
    runtime.finish()
    return tuple(order)


def test_streams_run_in_any_order_and_each_in_its_own() -> None:
    orders = {order_of(seed) for seed in SEEDS}
    assert all(order.index(1) < order.index(2) and order.index(-1) < order.index(-2) for order in orders)
    assert len(orders) > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_that_share_memory_need_an_event_between_them(seed: int) -> None:
    runtime, memory = FakeRuntime(seed), bytes_of(0)
    stream, event, found = runtime.new_stream(), runtime.new_event(), list[int]()
    runtime.copy(memory, bytes_of(7))
    event.record()
    with pytest.raises(LifetimeError):
        runtime.launch(lambda: None, [memory], stream=stream)
    stream.wait(event)
    runtime.launch(lambda: found.append(int(memory[0])), [memory], stream=stream)
    runtime.finish()
    assert found == [7]


def test_memory_that_an_operation_has_is_not_free() -> None:
    runtime, memory = FakeRuntime(0), bytes_of(0, 0, 0)
    runtime.launch(lambda: None, [memory[:2]])
    runtime.check_unnamed(memory[2:])
    with pytest.raises(LifetimeError):
        runtime.check_unnamed(memory[1:])
    event = runtime.new_event()
    event.record()
    event.synchronize()
    runtime.check_unnamed(memory)
