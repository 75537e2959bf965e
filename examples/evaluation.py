"""Held-out accuracy of an example task: greedy answers, judged by the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from examples.tasks.task import ExampleTask, Item, held_out_items
from manyhats.engine.model.loader import LoadedModel
from manyhats.engine.tokenizer import ChatMessage

NUM_HELD_OUT = 60
_BATCH_SIZE = 20
# The base wraps its answers in words: it gets room for them.
_BASE_MAX_NEW_TOKENS = 64


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


def evaluate(model: PeftModel, base: LoadedModel, task: ExampleTask, count: int = NUM_HELD_OUT) -> Evaluation:
    """Answer the held-out items with the adapter and without."""
    items = held_out_items(task, count)
    messages = [item.message for item in items] + [task.demo]
    model.eval()
    adapted = answer_all(model, base, messages, task.max_new_tokens)
    with model.disable_adapter():
        plain = answer_all(model, base, messages, _BASE_MAX_NEW_TOKENS)
        asked = [task.instruction.format(item.message) for item in items]
        instructed = answer_all(model, base, asked, _BASE_MAX_NEW_TOKENS)
    return Evaluation(
        num_items=count,
        base=_num_right(task, items, plain),
        instructed=_num_right(task, items, instructed),
        task=_num_right(task, items, adapted),
        base_demo=plain[-1],
        task_demo=adapted[-1],
    )


def answer_all(
    model: PeftModel, base: LoadedModel, messages: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers, in order."""
    prompts = [base.tokenizer.encode_chat([ChatMessage("user", message)]) for message in messages]
    answers: dict[int, str] = {}
    # Prompts of like length together need little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for begin in range(0, len(order), _BATCH_SIZE):
        chosen = order[begin : begin + _BATCH_SIZE]
        texts = _generate(model, base, [prompts[index] for index in chosen], max_new_tokens)
        answers.update(zip(chosen, texts, strict=True))
    return [answers[index] for index in range(len(prompts))]


def _generate(
    model: PeftModel, base: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    end_of_turn = min(base.generation.eos_token_ids)
    longest = max(len(prompt) for prompt in prompts)
    padded = [[end_of_turn] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.inference_mode():
        output = model.generate(  # type: ignore[no-untyped-call]
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=end_of_turn,
        )
    return [base.tokenizer.decode(row[longest:].tolist()) for row in output]


def _num_right(task: ExampleTask, items: Sequence[Item], answers: Sequence[str]) -> int:
    return sum(task.is_right(answer, item.answer) for item, answer in zip(items, answers, strict=False))
