from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter, PromptEmbeddings
from manyhats.engine import engine as engine_module
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import EngineConfig, scheduler_config
from manyhats.engine.engine import Engine
from manyhats.engine.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    FieldInvalidError,
    ModelError,
    NumericalError,
    PromptTooLongError,
    QueueFullError,
)
from manyhats.engine.loop.generation import Generation
from manyhats.engine.opening import open_engine
from manyhats.engine.output import FinishReason
from manyhats.engine.request import ResponseOptions, SamplingParams, ScoreRequest, StoppingParams
from support.factories.architectures import make_architecture, make_attention
from support.factories.tiny_models import EOS_TOKEN_ID, TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import default_model
from support.harnesses.engine import (
    collect,
    digest_of,
    load_tiny,
    make_record,
    make_request,
    overflowing_lora,
    random_ids,
    random_lora,
    running_engine,
    until,
)
from support.oracles.transformers import full_logits, greedy, load_transformers, next_logprobs

LONG = 400


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_checkpoint(tmp_path_factory.mktemp("engine") / "model", seed=13)


@pytest.fixture(scope="module")
def model(directory: Any) -> LoadedModel:
    return load_tiny(directory)


def prompt(seed: int, length: int = 12) -> list[int]:
    return random_ids(seed, length, TINY_VOCAB_SIZE)


def is_idle(engine: Engine) -> bool:
    stats = engine.stats
    return (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)


async def test_greedy_answers_equal_transformers(model: LoadedModel, directory: Any) -> None:
    oracle = load_transformers(directory)
    async with running_engine(model) as engine:
        answers = await asyncio.gather(
            *(collect(engine, make_request(prompt(seed, 1 + 15 * seed))) for seed in range(4))
        )
    for seed, answer in enumerate(answers):
        assert answer.token_ids == greedy(oracle, prompt(seed, 1 + 15 * seed), 8)
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.text == model.tokenizer.decode(answer.token_ids)
        assert answer.usage.generated_tokens == 8
        # An output for each step, unless the reader falls behind.
        num_tokens = [len(output.tokens) for output in answer.outputs]
        assert (sum(num_tokens), min(num_tokens)) == (8, 1)
        assert all(output.finish_reason is None for output in answer.outputs[:-1])


async def test_prompt_logprobs_equal_a_full_forward(model: LoadedModel, directory: Any) -> None:
    oracle = load_transformers(directory)
    options = ResponseOptions(logprobs=True, top_logprobs=4, prompt_logprobs=True)
    async with running_engine(model, max_num_batched_tokens=16) as engine:
        for length in (1, 16, 50):
            token_ids = prompt(length, length)
            # Twice: with prompt_logprobs, no position may come from the prefix cache.
            for _ in range(2):
                answer = await collect(engine, make_request(token_ids, new_tokens=3, response=options))
                whole = [*token_ids, *answer.token_ids]
                logits = full_logits(oracle, whole)
                expected = next_logprobs(logits, whole)
                entries = [*answer.prompt_tokens, *answer.tokens]
                assert [entry.id for entry in entries] == whole
                assert (entries[0].logprob, entries[0].rank, entries[0].top) == (None, None, ())
                found = torch.tensor([entry.logprob for entry in entries[1:]]).double()
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
                for position, entry in enumerate(entries[1:]):
                    row = logits[position]
                    assert entry.rank == int((row > row[entry.id]).sum()) + 1
                    assert [top.id for top in entry.top] == row.topk(4).indices.tolist()
                assert all(not output.prompt_tokens for output in answer.outputs[1:])
                assert answer.usage.cached_prompt_tokens == 0


async def test_a_client_that_leaves_frees_its_blocks_and_its_adapter_and_disturbs_nobody(
    model: LoadedModel, steps_are_slow: None
) -> None:
    adapters = {"a": random_lora(model.description, 1), "b": random_lora(model.description, 2)}
    async with running_engine(model, adapters) as engine:
        other = asyncio.create_task(collect(engine, make_request(prompt(2), make_record("b"), new_tokens=25)))
        leaving = engine.generate(make_request(prompt(1, 60), make_record("a"), new_tokens=LONG))
        for _ in range(3):
            await anext(leaving)
        assert engine.in_use(make_record("a"))
        pinned_after_step: list[bool] = []
        engine.loop.on_step = lambda stats: pinned_after_step.append(engine.in_use(make_record("a")))
        await leaving.aclose()
        await until(lambda: pinned_after_step[-1:] == [False] or is_idle(engine))
        # A step may end before it leaves, one may be under way, and the next one's turn frees everything.
        assert pinned_after_step.count(True) <= 3
        assert not engine.in_use(make_record("a"))
        assert engine.stats.num_running <= 1
        assert engine.stats.kv_blocks_used <= 3, "more than the other request can hold"
        answer = await other
        alone = await collect(engine, make_request(prompt(2), make_record("b"), new_tokens=25))
        assert answer.tokens == alone.tokens
        await until(lambda: is_idle(engine))


async def test_a_task_that_is_cancelled_frees_everything(model: LoadedModel, steps_are_slow: None) -> None:
    async with running_engine(model) as engine:
        tasks = [
            asyncio.create_task(collect(engine, make_request(prompt(seed), new_tokens=LONG)))
            for seed in range(10)
        ]
        score = ScoreRequest(id="s", prompt_token_ids=tuple(prompt(1)), continuations=((5, 6),) * 200)
        tasks.append(asyncio.create_task(engine.score(score)))  # type: ignore[arg-type]
        await until(lambda: engine.stats.num_running == 8)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await until(lambda: is_idle(engine), timeout_s=2)
        assert (await collect(engine, make_request(prompt(1)))).finish_reason is FinishReason.LENGTH


async def test_a_deadline_and_a_time_limit(model: LoadedModel, steps_are_slow: None) -> None:
    async with running_engine(model, {"a": random_lora(model.description, 1)}) as engine:
        now = time.monotonic()
        late = make_request(
            prompt(1), make_record("a"), new_tokens=LONG, deadline_s=now + 0.1, accepted_s=now
        )
        stopping = StoppingParams(max_new_tokens=LONG, ignore_eos=True, time_limit_s=0.1)
        limited = make_request(prompt(2), stopping=stopping, accepted_s=now)
        with pytest.raises(DeadlineExceededError):
            await collect(engine, late)
        answer = await collect(engine, limited)
        assert answer.finish_reason is FinishReason.TIME_LIMIT
        assert len(answer.tokens) < LONG
        await until(lambda: is_idle(engine) and not engine.in_use(make_record("a")))


async def test_an_adapter_whose_numbers_overflow_fails_its_own_requests_alone(model: LoadedModel) -> None:
    adapters = {"good": random_lora(model.description, 1), "bad": overflowing_lora(model.description)}
    async with running_engine(model, adapters) as engine:
        good = make_request(prompt(1), make_record("good"), new_tokens=20)
        expected = await collect(engine, good)
        results = await asyncio.gather(
            *(collect(engine, r) for r in (good, make_request(prompt(2), make_record("bad")), good)),
            return_exceptions=True,
        )
        assert isinstance(results[1], NumericalError)
        for result in (results[0], results[2]):
            assert not isinstance(result, BaseException)
            assert result.tokens == expected.tokens
        score = ScoreRequest(
            id="s", prompt_token_ids=(5, 6), continuations=((7,), (8,)), adapter=make_record("bad")
        )
        with pytest.raises(NumericalError):
            await engine.score(score)
        await until(lambda: is_idle(engine) and not engine.in_use(make_record("bad")))
        assert (await collect(engine, good)).tokens == expected.tokens


async def test_a_dead_engine_tells_every_stream_and_takes_no_more(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(model, {"a": random_lora(model.description, 1)}) as engine:
        assert engine.is_alive
        streams = [engine.generate(make_request(prompt(seed), new_tokens=LONG)) for seed in range(2)]
        streams.append(engine.generate(make_request(prompt(3), make_record("a"), new_tokens=LONG)))
        for stream in streams:
            await anext(stream)

        def broken(*_: Any) -> Any:
            raise SystemExit("the decoder broke")  # an Exception would end the step's requests alone

        monkeypatch.setattr(default_model(), "forward", broken)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
        await until(lambda: not engine.is_alive)
        assert not engine.in_use(make_record("a"))
        with pytest.raises(EngineDeadError):
            await collect(engine, make_request(prompt(1)))
        with pytest.raises(EngineDeadError):
            await engine.score(ScoreRequest(id="s", prompt_token_ids=(5,), continuations=((7,),)))


async def test_a_request_that_joins_at_the_moment_the_engine_dies_is_told(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found alive when the request was checked, and is gone before the request reaches it."""
    async with running_engine(model) as engine:

        def broken(*_: Any) -> Any:
            raise SystemExit("the decoder broke")  # an Exception would end the step's requests alone

        class DyingGeneration(Generation):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                if arguments[1].prompt_token_ids == (6,):
                    engine.loop.join(10)  # the event loop stands still meanwhile
                    assert not engine.is_alive

        monkeypatch.setattr(default_model(), "forward", broken)
        monkeypatch.setattr(engine_module, "Generation", DyingGeneration)
        tasks = [asyncio.create_task(collect(engine, make_request([token]))) for token in (5, 6)]
        for task in tasks:
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(task, 5)


async def test_draining_finishes_what_runs_and_refuses_the_rest(
    model: LoadedModel, steps_are_slow: None
) -> None:
    async with running_engine(model) as engine:
        running = asyncio.create_task(collect(engine, make_request(prompt(1), new_tokens=60)))
        await until(lambda: engine.stats.num_running == 1)
        stopping = asyncio.create_task(engine.stop(drain_s=20))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await collect(engine, make_request(prompt(2)))
        assert len((await running).tokens) == 60
        await stopping
        assert not engine.is_alive


async def test_what_outlasts_the_drain_is_ended(model: LoadedModel, steps_are_slow: None) -> None:
    async with running_engine(model) as engine:
        running = asyncio.create_task(collect(engine, make_request(prompt(1), new_tokens=LONG)))
        await until(lambda: engine.stats.num_running == 1)
        await engine.stop(drain_s=0.05)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(running, 5)


async def test_a_full_queue_refuses_what_comes_after(model: LoadedModel, steps_are_slow: None) -> None:
    async with running_engine(model, max_num_sequences=1, max_waiting=2) as engine:
        tasks = [
            asyncio.create_task(collect(engine, make_request(prompt(seed), new_tokens=10)))
            for seed in range(8)
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFullError)]
        served = [result for result in results if not isinstance(result, BaseException)]
        assert len(refused) + len(served) == 8
        assert refused
        assert all(len(answer.tokens) == 10 for answer in served)
        await until(lambda: is_idle(engine))


BAD_REQUESTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty prompt": (lambda: make_request([]), FieldInvalidError, "prompt"),
    "token outside the vocabulary": (
        lambda: make_request([3, TINY_VOCAB_SIZE]),
        FieldInvalidError,
        "prompt",
    ),
    "negative token": (lambda: make_request([-1]), FieldInvalidError, "prompt"),
    "prompt one over the limit": (lambda: make_request([5] * 512), PromptTooLongError, "prompt"),
    "stop token outside": (
        lambda: make_request([5], stopping=StoppingParams(stop_token_ids=(TINY_VOCAB_SIZE,))),
        FieldInvalidError,
        "stopping.stop_token_ids",
    ),
    "bias outside": (
        lambda: make_request([5], sampling=SamplingParams(logit_bias={TINY_VOCAB_SIZE: 1.0})),
        FieldInvalidError,
        "sampling.logit_bias",
    ),
    "nothing to score": (
        lambda: ScoreRequest(id="s", prompt_token_ids=(5,), continuations=()),
        FieldInvalidError,
        "continuations",
    ),
    "empty continuation": (
        lambda: ScoreRequest(id="s", prompt_token_ids=(5,), continuations=((6,), ())),
        FieldInvalidError,
        "continuations[1]",
    ),
    "continuation too long": (
        lambda: ScoreRequest(id="s", prompt_token_ids=(5,) * 500, continuations=((6,), (7,) * 13)),
        PromptTooLongError,
        "prompt",
    ),
}


async def test_bad_requests_are_refused_by_the_field_and_leave_nothing(model: LoadedModel) -> None:
    async with running_engine(model) as engine:
        assert engine.max_context_length == 512
        for make, error, field in BAD_REQUESTS.values():
            request = make()
            with pytest.raises(error) as caught:
                await (
                    engine.score(request) if isinstance(request, ScoreRequest) else collect(engine, request)
                )
            assert getattr(caught.value, "field") == field  # noqa: B009
        assert is_idle(engine)
        longest = await collect(engine, make_request([5] * 511, new_tokens=5))
        assert len(longest.tokens) == 1
        assert longest.finish_reason is FinishReason.LENGTH


async def test_seeds_make_answers_repeatable_and_no_seed_makes_them_differ(model: LoadedModel) -> None:
    def sampled(seed: int | None) -> Any:
        return make_request(
            prompt(1), new_tokens=16, sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
        )

    async with running_engine(model) as engine:
        seeds = (1, 2, 1, 2**64 - 1, None, None)
        answers = await asyncio.gather(*(collect(engine, sampled(seed)) for seed in seeds))
        again = await collect(engine, sampled(1))
    one, two, same, large, free, other = (answer.token_ids for answer in answers)
    assert one == same == again.token_ids
    assert len({tuple(tokens) for tokens in (one, two, large, free, other)}) == 5


async def test_stop_sequences_over_real_tokens(model: LoadedModel) -> None:
    async with running_engine(model) as engine:
        sampling = SamplingParams(temperature=1.2, seed=3)
        whole = await collect(engine, make_request(prompt(1), new_tokens=40, sampling=sampling))
        stop = whole.text[9:13]
        end = whole.text.index(stop)
        for include in (False, True):
            stopping = StoppingParams(
                max_new_tokens=40, ignore_eos=True, stop_sequences=(stop,), include_stop_sequence=include
            )
            answer = await collect(engine, make_request(prompt(1), sampling=sampling, stopping=stopping))
            assert answer.text == whole.text[: end + len(stop) * include]
            assert answer.finish_reason is FinishReason.STOP_SEQUENCE
            assert answer.token_ids == whole.token_ids[: len(answer.tokens)]


async def test_eos_comes_from_the_model_s_generation_config(model: LoadedModel) -> None:
    sampling = SamplingParams(logit_bias={EOS_TOKEN_ID: 1e4})
    async with running_engine(model) as engine:
        answer = await collect(
            engine, make_request(prompt(1), sampling=sampling, stopping=StoppingParams(min_new_tokens=3))
        )
    assert answer.finish_reason is FinishReason.EOS
    assert len(answer.tokens) == 4
    assert answer.token_ids[-1] == EOS_TOKEN_ID


# Adapters


async def test_adapters_are_loaded_once_evicted_and_loaded_again(model: LoadedModel) -> None:
    loaded: list[str] = []

    def load(record: AdapterRecord) -> LoweredAdapter:
        loaded.append(record.task_id)
        return random_lora(model.description, ord(record.task_id))

    async with running_engine(model, load) as engine:
        await engine.warm_adapter(make_record("a"))
        num_bytes = engine.residency_stats.resident_bytes
    loaded.clear()
    async with running_engine(model, load, max_adapter_bytes=2 * num_bytes) as engine:
        first = await collect(engine, make_request(prompt(1), make_record("a")))
        assert first.usage.adapter_load_s > 0
        again = await collect(engine, make_request(prompt(1), make_record("a")))
        for task in "bc":
            await engine.warm_adapter(make_record(task))
        assert engine.resident_digests() == {digest_of("b"), digest_of("c")}
        back = await collect(engine, make_request(prompt(1), make_record("a")))
        assert first.tokens == again.tokens == back.tokens
        assert loaded == ["a", "b", "c", "a"]
        assert engine.residency_stats.num_evictions == 2
        assert engine.model_bytes["adapters"] == engine.residency_stats.resident_bytes > 0
        engine.forget_adapter(digest_of("a"))
        assert engine.resident_digests() == {digest_of("c")}


async def test_a_failed_load_fails_the_requests_that_asked_and_nobody_else(model: LoadedModel) -> None:
    def load(record: AdapterRecord) -> LoweredAdapter:
        raise ValueError("torn")

    async with running_engine(model, load) as engine:
        with pytest.raises(ValueError, match="torn"):
            await collect(engine, make_request(prompt(1), make_record("a")))
        with pytest.raises(ValueError, match="torn"):
            await engine.warm_adapter(make_record("a"))
        assert engine.resident_digests() == set()
        assert len((await collect(engine, make_request(prompt(1)))).tokens) == 8


async def test_a_slow_load_delays_neither_the_base_nor_loaded_tasks_and_may_be_abandoned(
    model: LoadedModel,
) -> None:
    gate = threading.Event()

    def load(record: AdapterRecord) -> LoweredAdapter:
        if record.task_id == "slow":
            assert gate.wait(20)
        return random_lora(model.description, 1)

    async with running_engine(model, load) as engine:
        await engine.warm_adapter(make_record("quick"))
        slow = asyncio.create_task(collect(engine, make_request(prompt(1), make_record("slow"))))
        await until(lambda: engine.stats.waiting_adapters == ("slow@1",))
        for adapter in (None, make_record("quick")):
            assert len((await collect(engine, make_request(prompt(2), adapter))).tokens) == 8
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert engine.stats.waiting_adapters == ()
        gate.set()
        await until(lambda: digest_of("slow") in engine.resident_digests())
        await until(lambda: not engine.in_use(make_record("slow")))


async def test_an_adapter_forgotten_while_in_use_serves_its_request_to_the_end(
    model: LoadedModel, steps_are_slow: None
) -> None:
    adapters = {"a": random_lora(model.description, 1)}
    async with running_engine(model, adapters) as engine:
        expected = await collect(engine, make_request(prompt(1), make_record("a"), new_tokens=60))
        task = asyncio.create_task(collect(engine, make_request(prompt(1), make_record("a"), new_tokens=60)))
        await until(lambda: engine.in_use(make_record("a")))
        engine.forget_adapter(digest_of("a"))
        assert engine.resident_digests() == set()
        assert (await task).tokens == expected.tokens
        await until(lambda: engine.model_bytes["adapters"] == 0)


async def test_a_replaced_adapter_s_keys_and_values_are_never_reused(model: LoadedModel) -> None:
    """Two versions of a task, one prompt: blocks are found by the digest of the adapter's bytes."""
    versions = {"old": random_lora(model.description, 1), "new": random_lora(model.description, 2)}
    async with running_engine(model, versions) as engine:
        token_ids = prompt(1, 60)
        old = await collect(engine, make_request(token_ids, make_record("old")))
        new = await collect(engine, make_request(token_ids, make_record("new")))
        same = await collect(engine, make_request(token_ids, make_record("new")))
        base = await collect(engine, make_request(token_ids))
    assert [answer.usage.cached_prompt_tokens for answer in (old, new, same, base)] == [0, 0, 48, 0]
    assert new.tokens == same.tokens
    assert len({tuple(answer.token_ids) for answer in (old, new, base)}) == 3


# Life


async def test_a_model_whose_logits_are_not_finite_does_not_start(model: LoadedModel) -> None:
    weights = model.weights
    embedding = torch.full_like(weights.embedding, torch.nan)
    broken = replace(model, weights=replace(weights, embedding=embedding))
    engine = open_engine(broken, EngineConfig(dtype="float32", num_threads=1), lambda record: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match="not finite"):
        await engine.start()
    assert not engine.is_alive
    await engine.stop()


async def test_nothing_runs_before_start_nor_after_stop(model: LoadedModel) -> None:
    async with running_engine(model) as engine:
        assert engine.is_alive
    for ended in (engine, open_engine(model, EngineConfig(num_threads=1), lambda record: 1 / 0)):  # type: ignore[arg-type,return-value]
        assert not ended.is_alive
        with pytest.raises((EngineDeadError, DrainingError)):
            await collect(ended, make_request(prompt(1)))
        await ended.stop()


async def test_an_idle_engine_s_heart_beats(model: LoadedModel) -> None:
    async with running_engine(model) as engine:
        before = engine.stats.heartbeat_s
        await until(lambda: engine.stats.heartbeat_s > before)
        assert abs(engine.stats.heartbeat_s - time.time()) < 5


async def test_the_longest_request_behind_virtual_tokens_fits_into_the_pool(model: LoadedModel) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4
    embeddings = torch.randn((17, 64), generator=torch.Generator().manual_seed(3))
    soft = LoweredAdapter(digest_of("soft"), (), PromptEmbeddings(embeddings))
    async with running_engine(model, {"soft": soft}, kv_cache_bytes=10 * block_bytes) as engine:
        longest = engine.max_context_length - 17
        record = make_record("soft", soft.digest)
        answer = await asyncio.wait_for(
            collect(engine, make_request([5] * (longest - 4), adapter=record, new_tokens=4)), 20
        )
        assert len(answer.token_ids) == 4
        with pytest.raises(PromptTooLongError):
            await collect(engine, make_request([5] * longest, adapter=record))


async def test_the_kv_pool_is_sized_by_bytes_and_bounds_the_context(model: LoadedModel) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4
    async with running_engine(model, kv_cache_bytes=10 * block_bytes + 5) as engine:
        assert engine.stats.kv_blocks_total == 10
        assert engine.model_bytes["kv"] == 10 * block_bytes
        assert engine.max_context_length == 160
        with pytest.raises(PromptTooLongError) as caught:
            await collect(engine, make_request([5] * 160))
        assert caught.value.limit == 159
    with pytest.raises(FieldInvalidError, match="kv_cache_bytes"):
        open_engine(model, EngineConfig(kv_cache_bytes=100), lambda record: 1 / 0)  # type: ignore[arg-type,return-value]


async def test_a_task_at_its_limit_waits_and_the_engine_is_neither_busy_nor_stuck(model: LoadedModel) -> None:
    def load(record: AdapterRecord) -> LoweredAdapter:
        return random_lora(model.description, 1)

    limited = replace(make_record("a"), labels={"limit.tokens_per_second": "60", "limit.concurrency": "1"})
    async with running_engine(model, load) as engine:
        alone = await collect(engine, make_request(prompt(1), limited))
        began_s, turns = time.monotonic(), []
        engine.loop.on_step = turns.append
        requests = [make_request(prompt(1), limited) for _ in range(6)]
        answers = [asyncio.create_task(collect(engine, request)) for request in requests]
        base = await collect(engine, make_request(prompt(2)))
        assert not all(task.done() for task in answers)
        assert base.finish_reason is FinishReason.LENGTH
        assert [(await task).tokens for task in answers] == [alone.tokens] * 6
        # 19 tokens each are computed: what is left of a second's at once, and the last begins before all are paid for.
        assert time.monotonic() - began_s > 0.4
        assert engine.silent_s < 1
        assert len(turns) <= 6 * 9 + 9


async def test_what_would_read_its_prompt_past_its_deadline_is_refused_at_once(
    model: LoadedModel, steps_are_slow: None
) -> None:
    async with running_engine(model) as engine:
        await collect(engine, make_request(prompt(1, 200), new_tokens=1))
        began_s = time.monotonic()
        late = make_request(prompt(2, LONG), new_tokens=1, deadline_s=began_s + 0.001)
        with pytest.raises(DeadlineExceededError):
            await collect(engine, late)
        assert is_idle(engine)


def test_a_step_of_an_encoder_has_four_times_the_tokens() -> None:
    config = EngineConfig(max_num_batched_tokens=100)
    for sees_all, expected in ((False, 100), (True, 400)):
        architecture = make_architecture(replace(make_attention(2, 2, 16), sees_all=sees_all))
        assert scheduler_config(config, architecture) == replace(
            config.scheduler, max_num_batched_tokens=expected
        )
