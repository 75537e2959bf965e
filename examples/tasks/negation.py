"""``negation``: a statement → its contrary, by one *not*. All words are written for this project."""

from __future__ import annotations

import random

from examples.settings import AdaLoraSettings
from examples.tasks.task import ExampleTask, Item, Split, optimization, same_text, words

_VERBS = words("is, was, can, will, should, must, has")
_AFTER = {"is": "state", "was": "state", "has": "done"}
_PEOPLE = {
    Split.TRAIN: words("The cook, My sister, The driver, Our dog, The boy, Your friend, Maria, The king"),
    Split.HELD_OUT: words("The nurse, My cousin, The cat, Tom"),
}
_WORDS = {
    "state": {
        Split.TRAIN: words("tired, at home, happy, in the garden, ready, afraid of the dark, late, hungry"),
        Split.HELD_OUT: words("angry, on the roof, sure of it, alone"),
    },
    "do": {
        Split.TRAIN: words("read the letter, swim, open the box, wait here, sing, find the key, drive home"),
        Split.HELD_OUT: words("climb the hill, dance, repair the lamp, answer today"),
    },
    "done": {
        Split.TRAIN: words("read the letter, seen the sea, opened the box, found the key, eaten, called us"),
        Split.HELD_OUT: words("repaired the lamp, answered, painted the door, lost the map"),
    },
}


def _draw(rng: random.Random, split: Split) -> Item:
    person, verb = rng.choice(_PEOPLE[split]), rng.choice(_VERBS)
    rest = rng.choice(_WORDS[_AFTER.get(verb, "do")][split])
    end = rng.choice(("", ", he said", " this week", ", as everybody knows"))
    return Item(f"{person} {verb} {rest}{end}.", f"{person} {verb} not {rest}{end}.")


def _is_right(answer: str, wanted: str) -> bool:
    """The same words; n't will do."""
    return same_text(
        answer.replace("can't", "can not").replace("n't", " not").replace("cannot", "can not"), wanted
    )


NEGATION = ExampleTask(
    name="negation",
    summary="Says the contrary of a statement.",
    data="People, verbs that take *not*, and what follows them, in one pattern. People and most words after the verb "
    "of the held-out items are never trained on.",
    instruction="Negate this sentence with the word not. Answer with the sentence only.\n\n{}",
    max_new_tokens=32,
    draw=_draw,
    is_right=_is_right,
    adapter=AdaLoraSettings(initial_rank=4, target_rank=2, alpha=16, target_modules=("q_proj", "v_proj")),
    training=optimization(5e-3),
    num_train=640,
    demo="My cousin can repair the lamp, he said.",
)
