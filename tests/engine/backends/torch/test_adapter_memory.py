"""A GPU's memory for adapters, counted: who makes room, and an engine whose adapters do not fit together."""

from __future__ import annotations

import asyncio
import threading
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from manyhats.adapters.errors import AdapterTooLargeError
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.backends.torch.batched.adapter_memory import CountedMemory
from manyhats.engine.backends.torch.batched.adapters import DeviceAdapterSlots, HostAdapter
from manyhats.engine.residency.tiers import Tier
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import DEVICE
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

TASKS = [f"task-{number}" for number in range(4)]


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 9), st.integers(0, 40))
def test_the_first_slots_that_have_what_is_missing_make_room(
    sizes: list[int], spare: int, needed: int
) -> None:
    memory = CountedMemory(sum(sizes) + spare)
    for slot, size in enumerate(sizes, start=1):
        memory.take(slot, size)
    slots = list(range(1, len(sizes) + 1))
    totals = list(accumulate(sizes, initial=spare))
    count = next((number for number, total in enumerate(totals) if total >= needed), None)
    assert memory.evictions(needed, slots) == (None if count is None else slots[:count])


def test_what_has_no_room_is_refused_and_what_is_given_back_is_free() -> None:
    memory = CountedMemory(10)
    memory.take(1, 7)
    with pytest.raises(MemoryError, match="4 bytes are needed; 3 of 10 are free"):
        memory.take(2, 4)
    memory.give_back(1)
    memory.give_back(1)
    memory.take(2, 4)
    assert (memory.num_free_bytes, memory.num_copied_bytes) == (6, 11)
    assert memory.bytes_of(SimpleNamespace(num_bytes=3)) == 3  # type: ignore[arg-type]


def backend_of(adapter_bytes: int) -> TorchBackend:
    limits = Limits(max_rows=64, max_sequences=8, adapter_bytes=adapter_bytes, memory_fraction=0.9)
    return TorchBackend(DEVICE, "float32", by_row=False, limits=limits)


async def test_adapters_that_do_not_fit_together_take_turns_and_answer_as_if_they_did(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5))
    adapters = {
        task: random_lora(model.description, seed, rank=4) for seed, task in enumerate(TASKS, start=1)
    }
    records = {task: make_record(task) for task in TASKS}
    prompts = {task: random_ids(seed, 9, TINY_VOCAB_SIZE) for seed, task in enumerate(TASKS)}

    async def answers(adapter_bytes: int) -> tuple[list[list[int]], int, int]:
        async with running_engine(model, adapters, backend=backend_of(adapter_bytes)) as engine:
            requests = [make_request(prompts[task], records[task]) for task in TASKS for _ in range(3)]
            found = await asyncio.gather(*(collect(engine, request) for request in requests))
            again = [await collect(engine, make_request(prompts[task], records[task])) for task in TASKS]
            num_placed = list(engine.adapter_tiers().values()).count(Tier.DEVICE)
            assert engine.residency_stats.num_loads == len(TASKS)
            return (
                [answer.token_ids for answer in (*found, *again)],
                num_placed,
                engine.residency_stats.num_slot_evictions,
            )

    slots = backend_of(1 << 30).new_adapters(model.architecture, 2, "float32")
    num_bytes = max(slots.pack(each).num_bytes for each in adapters.values())
    expected, num_placed, num_evictions = await answers(1 << 30)
    assert (num_placed, num_evictions) == (4, 0)
    with capture_logs() as logs:
        found, num_placed, num_evictions = await answers(2 * num_bytes + 100)
    assert found == expected
    assert num_placed == 2
    assert num_evictions >= 2
    assert not [entry for entry in logs if entry["log_level"] in ("warning", "error")]


async def test_others_are_answered_while_an_adapter_is_copied_and_nobody_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5))
    adapters = {task: random_lora(model.description, 1, rank=4) for task in TASKS[:2]}
    slots = backend_of(1 << 30).new_adapters(model.architecture, 2, "float32")
    room_for_one = slots.pack(adapters[TASKS[0]]).num_bytes
    first, second = (make_request(random_ids(0, 9, TINY_VOCAB_SIZE), make_record(task)) for task in TASKS[:2])
    base = make_request(random_ids(1, 9, TINY_VOCAB_SIZE))
    place, may_copy = DeviceAdapterSlots.place, threading.Event()

    def slow(slots: DeviceAdapterSlots, slot: int, packed: HostAdapter) -> None:
        assert may_copy.wait(20)
        place(slots, slot, packed)

    async with running_engine(model, adapters, backend=backend_of(room_for_one)) as engine:
        await collect(engine, first)
        monkeypatch.setattr(DeviceAdapterSlots, "place", slow)
        with capture_logs() as logs:
            waiting = asyncio.create_task(collect(engine, second))
            await until(lambda: engine.loop.step.scheduler.num_waiting == 1)
            await asyncio.sleep(0.1)  # alone, for several turns of the loop
            assert (await collect(engine, base)).token_ids
            assert not waiting.done()
            may_copy.set()
            assert (await waiting).token_ids
    assert not [entry for entry in logs if entry["log_level"] in ("warning", "error")]


async def test_an_adapter_that_can_never_fit_is_refused_and_others_are_served(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=5))
    small, large = (random_lora(model.description, 1, rank=rank) for rank in (2, 32))
    slots = backend_of(1 << 30).new_adapters(model.architecture, 2, "float32")
    adapters = {"small": small, "large": large}
    limit = slots.pack(small).num_bytes
    ids = random_ids(0, 5, TINY_VOCAB_SIZE)
    async with running_engine(model, adapters, backend=backend_of(limit)) as engine:
        with pytest.raises(AdapterTooLargeError, match=f"--gpu-adapter-bytes is {limit}"):
            await collect(engine, make_request(ids, make_record("large")))
        with pytest.raises(AdapterTooLargeError, match="of the GPU's memory"):
            await asyncio.to_thread(engine.probe, large)
        assert (await collect(engine, make_request(ids, make_record("small")))).token_ids
        assert await asyncio.to_thread(engine.probe, small) > 0
