"""Held-out accuracy of an example task: greedy answers of the engine, judged by the task."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from examples.data import NUM_HELD_OUT
from examples.tasks.task import ExampleTask, Item, held_out_items
from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import MIB, Dtype, EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.opening import open_engine
from manyhats.engine.request import Request, StoppingParams
from manyhats.engine.residency.residency import LoadAdapter
from manyhats.engine.text.tokenizer import ChatMessage

# The base wraps its answers in words: it gets room for them.
_BASE_MAX_NEW_TOKENS = 64
_KV_CACHE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Right answers of ``num_items`` held-out ones, and the answers to the task's demo message.

    Attributes:
        base: the base, given the same message.
        instructed: the base, asked in words.
        task: the adapter.
    """

    num_items: int
    base: int
    instructed: int
    task: int
    base_demo: str
    task_demo: str


@dataclass(frozen=True, slots=True)
class _Ask:
    """A message to a task, or to the base."""

    message: str
    adapter: AdapterRecord | None
    max_new_tokens: int


def evaluate(
    base: LoadedModel,
    task: ExampleTask,
    record: AdapterRecord,
    load_adapter: LoadAdapter,
    *,
    dtype: Dtype,
    num_threads: int,
    count: int = NUM_HELD_OUT,
) -> Evaluation:
    """Answer the held-out items with the adapter and without, all of them in flight together."""
    items = held_out_items(task, count)
    messages = [item.message for item in items]
    asks = [_Ask(message, record, task.max_new_tokens) for message in (*messages, task.demo)]
    asks += [_Ask(message, None, _BASE_MAX_NEW_TOKENS) for message in (*messages, task.demo)]
    asks += [_Ask(task.instruction.format(message), None, _BASE_MAX_NEW_TOKENS) for message in messages]
    config = EngineConfig(dtype=dtype, num_threads=num_threads, kv_cache_bytes=_KV_CACHE_BYTES)
    answers = asyncio.run(_answer_all(open_engine(base, config, load_adapter), base, asks))
    adapted, plain, instructed = (
        answers[: count + 1],
        answers[count + 1 : 2 * count + 2],
        answers[2 * count + 2 :],
    )
    return Evaluation(
        num_items=count,
        base=_num_right(task, items, plain),
        instructed=_num_right(task, items, instructed),
        task=_num_right(task, items, adapted),
        base_demo=plain[-1],
        task_demo=adapted[-1],
    )


async def _answer_all(engine: Engine, base: LoadedModel, asks: Sequence[_Ask]) -> list[str]:
    await engine.start()
    try:
        return await asyncio.gather(*(_answer(engine, base, ask) for ask in asks))
    finally:
        await engine.stop()


async def _answer(engine: Engine, base: LoadedModel, ask: _Ask) -> str:
    request = Request(
        id="",
        prompt_token_ids=tuple(base.tokenizer.encode_chat([ChatMessage("user", ask.message)])),
        adapter=ask.adapter,
        stopping=StoppingParams(max_new_tokens=ask.max_new_tokens),
    )
    return "".join([output.text async for output in engine.generate(request)])


def _num_right(task: ExampleTask, items: Sequence[Item], answers: Sequence[str]) -> int:
    return sum(task.is_right(answer, item.answer) for item, answer in zip(items, answers, strict=False))
