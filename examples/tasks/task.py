"""What an example task is: a generator of messages with their right answers, and how its adapter is trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from examples.settings import ExampleSettings
from manyhats.trainer.settings.settings import OptimizationSettings

_MAX_DRAWS_IN_VAIN = 2000


def optimization(learning_rate: float = 2e-3, *, epochs: int = 1) -> OptimizationSettings:
    """Passes in steps of eight messages, with ten steps of warm-up."""
    return OptimizationSettings(batch_size=8, warmup_steps=10, learning_rate=learning_rate, epochs=epochs)


class Split(Enum):
    """What items are for; generators draw held-out items from words that training never sees."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Item:
    """A user's message and the answer wanted."""

    message: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleTask:
    """One task.

    Attributes:
        name: the task id.
        summary: what it does, one sentence.
        data: what its data is and what is held out.
        instruction: how one asks the base for the same in words; ``{}`` is the message.
        max_new_tokens: enough for every answer.
        draw: one random item of a split.
        is_right: whether an answer is the wanted one, lenient about spelling that does not matter.
        adapter: its adapter's method and shape.
        num_train: training items.
        demo: a message to try, in no split.
        training: how it is trained.
        classes: all answers, of a task that answers with labels.
    """

    name: str
    summary: str
    data: str
    instruction: str
    max_new_tokens: int
    draw: Callable[[random.Random, Split], Item]
    is_right: Callable[[str, str], bool]
    adapter: ExampleSettings
    num_train: int
    demo: str
    training: OptimizationSettings = field(default_factory=optimization)
    classes: tuple[str, ...] = ()


def same_text(answer: str, wanted: str) -> bool:
    """Whether an answer is the wanted one; case, outer quotes and the kind of apostrophe do not count."""
    return answer.replace("’", "'").strip().strip('"“”').casefold() == wanted.casefold()


def label_judge(labels: Sequence[str]) -> Callable[[str, str], bool]:
    """Judges answers that are to be one of some labels: right if it names the wanted one and no other."""

    def is_right(answer: str, wanted: str) -> bool:
        return [label for label in labels if label in answer.casefold()] == [wanted]

    return is_right


def words(text: str) -> tuple[str, ...]:
    """The words and phrases of a list with commas between them."""
    return tuple(text.split(", "))


def train_items(task: ExampleTask) -> list[Item]:
    """The training items: distinct messages, the same list every time."""
    return _draw_distinct(task, Split.TRAIN, task.num_train, excluded={task.demo})


def held_out_items(task: ExampleTask, count: int) -> list[Item]:
    """The first ``count`` held-out items: distinct messages that are not trained on."""
    excluded = {item.message for item in train_items(task)} | {task.demo}
    return _draw_distinct(task, Split.HELD_OUT, count, excluded)


def _draw_distinct(task: ExampleTask, split: Split, count: int, excluded: set[str]) -> list[Item]:
    rng = random.Random(f"{task.name} {split.value}")
    items: dict[str, Item] = {}
    draws_in_vain = 0
    while len(items) < count:
        item = task.draw(rng, split)
        if item.message not in items and item.message not in excluded:
            items[item.message] = item
            draws_in_vain = 0
        elif (draws_in_vain := draws_in_vain + 1) == _MAX_DRAWS_IN_VAIN:
            raise ValueError(f"{task.name}: has no {count} distinct {split.value} items")
    return list(items.values())
