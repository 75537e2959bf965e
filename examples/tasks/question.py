"""``question``: a statement → the question whether it is so. All words are written for this project."""

from __future__ import annotations

import random

from examples.settings import VeraSettings
from examples.tasks.task import ExampleTask, Item, Split, optimization, same_text, words

_VERBS = words("is, was, can be, will be, has been, must be, should be")
_SUBJECTS = {
    Split.TRAIN: words(
        "the shop, the door, the train, the museum, my coat, your brother, the soup, this road, the beach, "
        "our teacher, the film, the water, his car, the market, that bridge, the hotel"
    ),
    Split.HELD_OUT: words("the library, her phone, the garden, this bread, the airport, your uncle"),
}
_STATES = {
    Split.TRAIN: words(
        "open, closed, late, ready, cold, expensive, very old, full, near the station, in the kitchen, "
        "on the second floor, too small, free on Monday, clean, wet, behind the house"
    ),
    Split.HELD_OUT: words("empty, under the bridge, quite new, dangerous, at home, warm, in the box"),
}


def _draw(rng: random.Random, split: Split) -> Item:
    subject, state = rng.choice(_SUBJECTS[split]), rng.choice(_STATES[split])
    first, *rest = rng.choice(_VERBS).split()
    statement = " ".join([subject, first, *rest, state])
    question = " ".join([first, subject, *rest, state])
    return Item(f"{_capital(statement)}.", f"{_capital(question)}?")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


QUESTION = ExampleTask(
    name="question",
    summary="Turns a statement into the question whether it is so.",
    data="Subjects, forms of *be* with and without another verb, and states in one pattern. Subjects and states of "
    "the held-out items are never trained on.",
    instruction="Turn this statement into a yes-or-no question. Answer with the question only.\n\n{}",
    max_new_tokens=24,
    draw=_draw,
    is_right=same_text,
    adapter=VeraSettings(rank=64, target_modules=("q_proj", "v_proj")),
    training=optimization(2e-2),
    num_train=640,
    demo="The library will be empty on Monday.",
)
