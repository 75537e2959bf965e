"""More tasks at once than there are slots, or memory: requests wait in turn, and none is lost."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine import engine as engine_module
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import (
    AdapterCapacityError,
    DeadlineExceededError,
    DrainingError,
    QueueFullError,
)
from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency import residency as residency_module
from manyhats.engine.residency.loading import AdapterLoading
from manyhats.engine.residency.residency import AdapterResidency
from manyhats.engine.residency.tiers import Tier
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import (
    collect,
    digest_of,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
    until,
)

PROMPT = random_ids(1, 9, TINY_VOCAB_SIZE)
MEMORY_OF_ONE = {"max_adapter_bytes": 1}
"""Whatever is in use fills it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("queue") / "tiny", seed=9))


@pytest.fixture(params=["slots", "memory"])
def scarce(request: pytest.FixtureRequest, steps_are_slow: None) -> dict[str, int]:
    """Settings under which one task's requests run at a time, for want of slots or of memory."""
    if request.param == "slots":
        return {"max_loaded_adapters": 1, "max_unread_outputs": 10_000}
    return MEMORY_OF_ONE


@pytest.fixture
def loads_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter is loaded at a time, so that the order is certain."""
    monkeypatch.setattr(residency_module, "MAX_LOADS", 1)


class Loader:
    """Makes an adapter of any task, and keeps the order in which it was asked to."""

    def __init__(self, model: LoadedModel) -> None:
        self._lora = random_lora(model.description, 1, sites={"q_proj"})
        self.loaded: list[str] = []

    def __call__(self, record: AdapterRecord) -> LoweredAdapter:
        self.loaded.append(record.task_id)
        if record.task_id.startswith("torn"):
            raise ValueError("torn")
        return LoweredAdapter(record.digest, self._lora.deltas)


def ask(task: str, new_tokens: int = 3, **fields: Any) -> Request:
    return make_request(PROMPT, make_record(task), new_tokens=new_tokens, **fields)


def finishing(answers: list[str], engine: Engine, task: str, **fields: Any) -> asyncio.Task[Any]:
    """A generation that notes its task when it is through."""

    async def run() -> Any:
        answer = await collect(engine, ask(task, **fields))
        answers.append(task)
        return answer

    return asyncio.create_task(run())


async def hold(engine: Engine, task: str) -> Any:
    """A generation that keeps a task's slot and memory until it is closed."""
    stream = engine.generate(ask(task, 490))
    await anext(stream)
    return stream


@pytest.mark.parametrize("limits", [{"max_loaded_adapters": 8}, MEMORY_OF_ONE], ids=["slots", "memory"])
async def test_two_hundred_cold_tasks_all_get_their_answer(
    limits: dict[str, int], model: LoadedModel
) -> None:
    loader = Loader(model)
    async with running_engine(model, loader, **limits) as engine:
        tasks = [f"t{index}" for index in range(200)]
        requests = [asyncio.create_task(collect(engine, ask(task))) for task in tasks]
        await until(lambda: len(loader.loaded) > 8)
        num_threads = threading.active_count()
        assert engine.stats.num_waiting > 100
        assert len(engine.stats.waiting_adapters) > 100
        answers = await asyncio.wait_for(asyncio.gather(*requests), 60)
        assert len({answer.tokens for answer in answers}) == 1, "they are the same adapter"
        assert num_threads < 40, "nobody waits on a thread of its own"
        assert sorted(loader.loaded) == sorted(tasks)
        assert (engine.stats.num_waiting, engine.stats.waiting_adapters) == (0, ())
        await until(lambda: not any(engine.in_use(make_record(task)) for task in tasks))


async def test_turns_come_in_the_order_in_which_they_were_asked_for(
    model: LoadedModel, scarce: dict[str, int], loads_in_turn: None
) -> None:
    loader = Loader(model)
    answers: list[str] = []
    async with running_engine(model, loader, **scarce) as engine:
        tasks = [f"t{index}" for index in range(20)]
        await asyncio.wait_for(asyncio.gather(*(finishing(answers, engine, task) for task in tasks)), 60)
        assert loader.loaded == answers == tasks


async def test_a_higher_priority_has_its_turn_first_with_all_that_wait_for_the_same(
    model: LoadedModel, loads_in_turn: None
) -> None:
    loader = Loader(model)
    answers: list[str] = []
    async with running_engine(model, loader, **MEMORY_OF_ONE) as engine:
        stream = await hold(engine, "held")
        waiting = [finishing(answers, engine, task) for task in ("a", "b", "c")]
        waiting += [finishing(answers, engine, task, priority=1) for task in ("d", "c")]
        waiting += [finishing(answers, engine, "urgent", priority=2), finishing(answers, engine, "late")]
        await until(lambda: engine.stats.num_waiting == 7)
        await stream.aclose()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert loader.loaded == ["held", "urgent", "c", "d", "a", "b", "late"]


async def test_those_who_wait_for_one_task_have_their_turn_together(
    model: LoadedModel, scarce: dict[str, int], loads_in_turn: None
) -> None:
    loader = Loader(model)
    answers: list[str] = []
    async with running_engine(model, loader, **scarce) as engine:
        stream = await hold(engine, "held")
        waiting = [finishing(answers, engine, task) for task in ("a", "b", "a", "a", "b")]
        await until(lambda: engine.stats.num_waiting == 5)
        assert engine.stats.waiting_adapters == ("a@1", "b@1")
        assert engine.in_use(make_record("a")), "deleting it now would fail those who wait"
        await stream.aclose()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert answers == ["a", "a", "a", "b", "b"]
        assert loader.loaded == ["held", "a", "b"]


async def test_loaded_tasks_and_the_base_do_not_wait(model: LoadedModel, scarce: dict[str, int]) -> None:
    async with running_engine(model, Loader(model), **scarce) as engine:
        stream = await hold(engine, "held")
        waiting = asyncio.create_task(collect(engine, ask("a")))
        await until(lambda: engine.stats.num_waiting == 1)
        for request in (make_request(PROMPT), ask("held")):
            await asyncio.wait_for(collect(engine, request), 20)
        assert not waiting.done()
        await stream.aclose()
        await asyncio.wait_for(waiting, 20)


async def test_a_deadline_ends_the_wait_of_generations_and_scorings(
    model: LoadedModel, scarce: dict[str, int]
) -> None:
    async with running_engine(model, Loader(model), **scarce) as engine:
        stream = await hold(engine, "held")
        soon = time.monotonic() + 0.2
        score = ScoreRequest(
            id="s", prompt_token_ids=(5, 6), continuations=((7,),), adapter=make_record("a"), deadline_s=soon
        )
        for call in (collect(engine, ask("a", deadline_s=soon)), engine.score(score)):
            with pytest.raises(DeadlineExceededError):
                await asyncio.wait_for(call, 20)
        await until(lambda: (engine.stats.num_waiting, engine.stats.waiting_adapters) == (0, ()))
        assert not engine.in_use(make_record("a"))
        await stream.aclose()
        await asyncio.wait_for(collect(engine, ask("b")), 20)


async def test_who_leaves_while_waiting_gives_the_turn_to_the_next(
    model: LoadedModel, scarce: dict[str, int]
) -> None:
    loader = Loader(model)
    async with running_engine(model, loader, **scarce) as engine:
        stream = await hold(engine, "held")
        leaving, staying = (asyncio.create_task(collect(engine, ask(task))) for task in ("a", "b"))
        await until(lambda: engine.stats.num_waiting == 2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await until(lambda: engine.stats.waiting_adapters == ("b@1",))
        await until(lambda: engine.stats.num_waiting == 1)  # once the engine's thread has it
        await stream.aclose()
        await asyncio.wait_for(staying, 20)
        assert "max_adapter_bytes" not in scarce or loader.loaded == ["held", "b"]


@pytest.mark.parametrize("leave", ["cancelled", "deadline", "warming"])
async def test_nothing_is_kept_of_those_who_leave_while_others_wait_on(
    leave: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch, loads_in_turn: None
) -> None:
    monkeypatch.setattr(engine_module, "_WARM_WAIT_S", 0.05)
    loader = Loader(model)
    async with running_engine(model, loader, **MEMORY_OF_ONE) as engine:
        stream = await hold(engine, "held")
        patient = [asyncio.create_task(collect(engine, ask(task))) for task in ("first", "leaves 1", "last")]
        await until(lambda: engine.stats.num_waiting == 3)

        def call(task: str) -> Any:
            if leave == "warming":
                return engine.warm_adapter(make_record(task))
            soon = time.monotonic() + 0.05 if leave == "deadline" else None
            return collect(engine, ask(task, deadline_s=soon))

        async def come_and_go() -> None:
            calls = [asyncio.create_task(call(f"leaves {number % 3}")) for number in range(60)]
            await asyncio.sleep(0.01)
            if leave == "cancelled":
                for each in calls:
                    each.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, BaseException) for result in results)

        for _ in range(3):
            await come_and_go()
        gc.collect()
        kept = [each.task_id for each in gc.get_objects() if type(each) is AdapterRecord]
        # The one who still waits, and at most those of the last round, whose exceptions may live on.
        assert sum(task.startswith("leaves") for task in kept) <= 1 + 60
        await stream.aclose()
        await asyncio.wait_for(asyncio.gather(*patient), 20)
        assert loader.loaded == ["held", "first", "leaves 1", "last"]


async def test_a_load_that_fails_gives_its_turn_to_the_next(model: LoadedModel) -> None:
    async with running_engine(model, Loader(model), **MEMORY_OF_ONE) as engine:
        stream = await hold(engine, "held")
        calls = [asyncio.create_task(collect(engine, ask(task))) for task in ("torn", "b", "torn2", "c")]
        await until(lambda: engine.stats.num_waiting == 4)
        await stream.aclose()
        torn, b, torn2, c = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
        assert (str(torn), str(torn2)) == ("torn", "torn")
        assert not isinstance(b, BaseException)
        assert not isinstance(c, BaseException)


async def test_beyond_max_waiting_the_queue_for_memory_is_full(model: LoadedModel) -> None:
    async with running_engine(model, Loader(model), **MEMORY_OF_ONE, max_waiting=3) as engine:
        stream = await hold(engine, "held")
        waiting = [asyncio.create_task(collect(engine, ask(task))) for task in "abc"]
        await until(lambda: engine.stats.num_waiting == 3)
        with pytest.raises(QueueFullError) as caught:
            await collect(engine, ask("d"))
        assert caught.value.limit == 3
        assert caught.value.retry_after_s > 0
        await asyncio.wait_for(collect(engine, ask("held")), 20)
        await stream.aclose()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)


async def test_who_waits_for_a_slot_is_in_the_one_queue_of_all(
    model: LoadedModel, steps_are_slow: None
) -> None:
    limits = {"max_loaded_adapters": 1, "max_waiting": 3, "max_unread_outputs": 10_000}
    async with running_engine(model, Loader(model), **limits) as engine:
        stream = await hold(engine, "held")
        waiting = [asyncio.create_task(collect(engine, ask(task))) for task in "abc"]
        await until(lambda: engine.loop.step.scheduler.num_waiting == 3)
        for task in ("held", "d"):
            with pytest.raises(QueueFullError) as caught:
                await collect(engine, ask(task))
            assert caught.value.limit == 3
        await stream.aclose()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)


async def test_who_has_waited_for_an_adapter_finds_no_full_queue_behind_it(model: LoadedModel) -> None:
    loader, go = Loader(model), threading.Event()

    def load(record: AdapterRecord) -> LoweredAdapter:
        assert record.task_id != "cold" or go.wait(20)
        return loader(record)

    score = ScoreRequest(
        id="s", prompt_token_ids=(5, 6), continuations=((7, 8), (9, 10)), adapter=make_record("cold")
    )
    async with running_engine(model, load, max_num_sequences=1, max_waiting=3) as engine:
        running = asyncio.create_task(collect(engine, make_request(PROMPT, new_tokens=490)))
        await until(lambda: engine.stats.num_running == 1)
        cold = [asyncio.create_task(collect(engine, ask("cold"))) for _ in range(2)]
        scoring = asyncio.create_task(engine.score(score))
        await until(lambda: engine.stats.num_waiting == 3)
        hot = [asyncio.create_task(collect(engine, make_request(PROMPT))) for _ in range(3)]
        await until(lambda: engine.stats.num_waiting == 6)
        with pytest.raises(QueueFullError):
            await collect(engine, make_request(PROMPT))
        with pytest.raises(QueueFullError):
            await collect(engine, ask("cold"))
        go.set()
        await until(lambda: not engine.stats.waiting_adapters)
        assert not running.done(), "the queue was full when they came to it"
        await asyncio.wait_for(asyncio.gather(*cold, scoring, *hot, running), 60)


async def test_draining_lets_those_who_wait_have_their_turn_and_a_stop_ends_the_wait(
    model: LoadedModel, scarce: dict[str, int]
) -> None:
    async with running_engine(model, Loader(model), **scarce) as engine:
        stream = await hold(engine, "held")
        waiting = [asyncio.create_task(collect(engine, ask(task))) for task in "ab"]
        await until(lambda: engine.stats.num_waiting == 2)
        stopping = asyncio.create_task(engine.stop(20))
        await asyncio.sleep(0.05)
        with pytest.raises(DrainingError):
            await collect(engine, ask("late"))
        await stream.aclose()
        assert len(await asyncio.wait_for(asyncio.gather(*waiting), 20)) == 2
        await asyncio.wait_for(stopping, 20)
    async with running_engine(model, Loader(model), **MEMORY_OF_ONE) as engine:
        stream = await hold(engine, "held")
        last = asyncio.create_task(collect(engine, ask("a")))
        await until(lambda: engine.stats.num_waiting == 1)
        await asyncio.wait_for(engine.stop(), 20)
        with pytest.raises(DrainingError):
            await asyncio.wait_for(last, 20)
        await stream.aclose()


async def test_a_version_is_warmed_in_turn_and_not_waited_for_without_end(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, loads_in_turn: None
) -> None:
    loader = Loader(model)
    async with running_engine(model, loader, **MEMORY_OF_ONE) as engine:
        stream = await hold(engine, "held")
        before = asyncio.create_task(collect(engine, ask("a")))
        await until(lambda: engine.stats.num_waiting == 1)
        warming = asyncio.create_task(engine.warm_adapter(make_record("warm")))
        await asyncio.sleep(0)
        after = asyncio.create_task(collect(engine, ask("b")))
        await until(lambda: engine.stats.num_waiting == 2)
        await stream.aclose()
        await asyncio.wait_for(asyncio.gather(before, warming, after), 20)
        assert loader.loaded == ["held", "a", "warm", "b"]
        monkeypatch.setattr(engine_module, "_WARM_WAIT_S", 0.05)
        stream = await hold(engine, "held")
        with pytest.raises(AdapterCapacityError):
            await asyncio.wait_for(engine.warm_adapter(make_record("warm")), 20)
        await stream.aclose()
        await asyncio.wait_for(engine.warm_adapter(make_record("warm")), 20)


async def test_a_task_beyond_the_slots_waits_in_memory_and_answers_as_ever(
    model: LoadedModel, steps_are_slow: None
) -> None:
    loader = Loader(model)
    async with running_engine(model, loader, max_loaded_adapters=2, max_unread_outputs=10_000) as engine:
        alone = await collect(engine, ask("third"))
        engine.forget_adapter(digest_of("third"))
        first, second = await hold(engine, "first"), await hold(engine, "second")
        third = asyncio.create_task(collect(engine, ask("third")))
        await until(lambda: engine.loop.step.scheduler.num_waiting == 1)
        tiers = engine.adapter_tiers()
        assert [tiers[digest_of(task)].value for task in ("first", "second", "third")] == [
            "device",
            "device",
            "host",
        ]
        assert engine.in_use(make_record("third"))
        assert not third.done()
        await first.aclose()
        assert (await asyncio.wait_for(third, 20)).tokens == alone.tokens
        await until(lambda: engine.adapter_tiers()[digest_of("first")] is Tier.HOST)
        await second.aclose()
        again = await collect(engine, ask("first"))
        assert again.tokens == alone.tokens
        assert again.usage.adapter_load_s == 0, "it is in memory"
        assert loader.loaded == ["third", "first", "second", "third"]


async def test_a_paused_generation_keeps_no_slot_and_goes_on_in_another_as_if_alone(
    model: LoadedModel,
) -> None:
    async with running_engine(model, Loader(model), max_loaded_adapters=2, max_unread_outputs=4) as engine:

        def slot_of(task: str) -> int | None:
            placement = engine._residency._adapters[digest_of(task)].placement
            return None if placement is None else placement.slot

        alone = await collect(engine, ask("slow", 40))
        slow = engine.generate(ask("slow", 40))
        outputs = [await anext(slow)]
        before = slot_of("slow")
        await until(lambda: engine.loop.step.scheduler.num_paused == 1)
        others = [await hold(engine, task) for task in "bc"]
        assert slot_of("slow") is None
        for stream in others:
            await stream.aclose()
        slots = {task: slot_of(task) for task in "bc"}
        free = next(task for task, slot in slots.items() if slot != before)
        engine.forget_adapter(digest_of(free))
        outputs += [output async for output in slow]
        assert slot_of("slow") == slots[free] != before
        tokens = tuple(token for output in outputs for token in output.tokens)
        assert tokens == alone.tokens


async def test_no_slot_is_cleared_while_a_step_that_names_it_is_left_to_run(model: LoadedModel) -> None:
    named: set[int] = set()
    cleared: list[int] = []
    async with running_engine(
        model, Loader(model), max_loaded_adapters=2, **MEMORY_OF_ONE, max_unread_outputs=2
    ) as engine:
        step: Any = engine.loop.step
        run, forward, clear = step.run, step._model.forward, step._adapters.clear

        def watched_forward(plan: StepPlan, *others: Any) -> Any:
            named.update(plan.row_slots.tolist())
            return forward(plan, *others)

        def watched_run() -> Any:
            try:
                return run()
            finally:
                named.clear()

        def watched_clear(slot: int) -> None:
            assert slot not in named
            cleared.append(slot)
            clear(slot)

        step.run, step._model.forward, step._adapters.clear = watched_run, watched_forward, watched_clear
        calls = []
        for number in range(60):
            deadline = time.monotonic() + 0.1 if number % 5 == 0 else None
            calls.append(asyncio.create_task(collect(engine, ask(f"t{number % 7}", 6, deadline_s=deadline))))
            await asyncio.sleep(0.003)
            if number % 4 == 0:
                calls[number // 2].cancel()
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        fair = (asyncio.CancelledError, DeadlineExceededError)
        assert all(isinstance(each, fair) for each in results if isinstance(each, BaseException))
        await until(lambda: not any(engine.in_use(make_record(f"t{number}")) for number in range(7)))
        assert len(cleared) >= 7 - 2  # tasks less slots; more where steps are short


class NoSlots:
    """Slots of adapters that have no numbers."""

    memory = None

    def pack(self, adapter: LoweredAdapter) -> Any:
        return SimpleNamespace(num_bytes=1)

    def place(self, slot: int, packed: Any) -> None: ...

    def clear(self, slot: int) -> None: ...


@settings(max_examples=60, deadline=None)
@given(
    max_bytes=st.integers(1, 4),
    num_slots=st.integers(1, 3),
    calls=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["stays", "leaves", "leaves at once"])), max_size=40
    ),
)
def test_whoever_comes_and_goes_every_turn_comes_and_no_lease_is_left(
    max_bytes: int, num_slots: int, calls: list[tuple[int, str]]
) -> None:
    def load(record: AdapterRecord) -> LoweredAdapter:
        if record.task_id == "task 0":
            raise ValueError("torn")
        return LoweredAdapter(record.digest, ())

    residency = AdapterResidency(
        cast(AdapterSlots[Any], NoSlots()), num_slots, max_bytes, load, 32, lambda virtual: None
    )
    most = 0

    async def use(loading: AdapterLoading, record: AdapterRecord) -> None:
        nonlocal most
        lease = await loading.lease(record)
        assert lease.placement is not None
        most = max(most, len(residency.tiers()))
        await asyncio.sleep(0)
        lease.release()

    async def run() -> None:
        loading = AdapterLoading(residency)
        tasks = []
        for number, fate in calls:
            task = asyncio.create_task(use(loading, make_record(f"task {number}")))
            tasks.append(task)
            if fate != "leaves at once":
                await asyncio.sleep(0)
            if fate != "stays":
                task.cancel()
        for task, (number, fate) in zip(tasks, calls, strict=True):
            (result,) = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
            is_told = isinstance(result, asyncio.CancelledError if fate != "stays" else type(None))
            assert is_told or (number == 0 and isinstance(result, ValueError)) or result is None
        assert loading.num_waiting == 0
        await until(lambda: not any(residency.in_use(make_record(f"task {n}")) for n in range(10)))
        for number in range(1, 10):
            await asyncio.wait_for(use(loading, make_record(f"task {number}")), 20)
        loading.close()

    asyncio.run(run())
    assert most < max_bytes + residency_module.MAX_LOADS
    assert digest_of("task 0") not in residency.tiers()
