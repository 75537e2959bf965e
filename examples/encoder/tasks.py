"""The tasks of the encoder: data, heads, and how their adapters are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from examples.data import NUM_HELD_OUT
from examples.encoder import contact
from examples.encoder.calls import Command
from examples.encoder.concierge import questions
from examples.tasks import TASKS
from examples.tasks.task import Item, Split, held_out_items, optimization, train_items
from manyhats.trainer.settings.head import HeadSettings
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    LoraSettings,
    PrefixSettings,
)
from manyhats.trainer.settings.settings import OptimizationSettings

Row = Mapping[str, str | list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTask:
    """One task.

    Attributes:
        name: the task id.
        summary: what it does, one sentence.
        command: that asks it.
        rows: the trainer's, of a split.
        adapter, head, training: how it is trained.
        demo: a text to try, in no split.
        classes: of the head, in order; none for vectors.
    """

    name: str
    summary: str
    command: Command
    rows: Callable[[Split], Sequence[Row]]
    adapter: AdapterSettings
    head: HeadSettings
    training: OptimizationSettings
    demo: str
    classes: tuple[str, ...] = ()


def _items(name: str, split: Split) -> list[Item]:
    """Those of the task of that name which answers in words."""
    task = TASKS[name]
    return train_items(task) if split is Split.TRAIN else held_out_items(task, NUM_HELD_OUT)


def _classified(name: str) -> Callable[[Split], Sequence[Row]]:
    def rows(split: Split) -> Sequence[Row]:
        return [{"text": item.message, "label": item.answer} for item in _items(name, split)]

    return rows


def _tagged(split: Split) -> Sequence[Row]:
    return [contact.tagged(item) for item in _items("contact-json", split)]


def _asked(split: Split) -> Sequence[Row]:
    return [{"query": question, "positive": note} for question, note in questions(split)]


def _classifier(
    name: str, summary: str, adapter: AdapterSettings, training: OptimizationSettings
) -> EncoderTask:
    """A task with the texts and classes of the one of that name which answers in words."""
    return EncoderTask(
        name=name,
        summary=summary,
        command="classify",
        rows=_classified(name),
        adapter=adapter,
        head=HeadSettings(kind="classification"),
        training=training,
        demo=TASKS[name].demo,
        classes=TASKS[name].classes,
    )


ENCODER_TASKS: dict[str, EncoderTask] = {
    task.name: task
    for task in (
        EncoderTask(
            name="concierge",
            summary="Brings a hotel guest's question close to the note that answers it.",
            command="embed",
            rows=_asked,
            adapter=LoraSettings(rank=8, alpha=16, target_modules=("query", "value"), use_dora=True),
            head=HeadSettings(kind="embedding"),
            training=optimization(2e-3, epochs=4),
            demo="I am shivering in my bed.",
        ),
        EncoderTask(
            name="contact",
            summary="Finds the names, mail addresses and phone numbers in a text.",
            command="tag",
            rows=_tagged,
            adapter=LoraSettings(rank=4, alpha=8),
            head=HeadSettings(kind="tokens"),
            training=optimization(2e-3),
            demo="Please write to Wendy Marino at wendy.m@example.org or call 555-0147.",
            classes=contact.CLASSES,
        ),
        _classifier(
            "intent",
            "Says what a house should do.",
            PrefixSettings(num_virtual_tokens=8, projection_size=0),
            optimization(2e-2, epochs=4),
        ),
        _classifier(
            "sentiment",
            "Says whether a sentence of a review is positive, negative or neutral.",
            BottleneckSettings(reduction_factor=16),
            optimization(5e-4, epochs=3),
        ),
        _classifier(
            "topic",
            "Says where a headline belongs.",
            LoraSettings(rank=4, alpha=8, target_modules=("query", "value")),
            optimization(2e-3),
        ),
    )
}
"""Task id → task."""
