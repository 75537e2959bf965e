"""``past-tense``: a sentence in the present → the same in the past. All words are written for this project."""

from __future__ import annotations

import random

from examples.tasks.task import ExampleTask, Item, Split, same_text, words
from manyhats.trainer.settings.methods import LoraSettings

_REGULAR = {
    Split.TRAIN: words(
        "paint, wash, open, close, clean, carry, cook, visit, watch, want, need, repair, count, follow, "
        "use, like, move, push, lift, check, order, finish, study, copy"
    ),
    Split.HELD_OUT: words("pack, climb, test, save, worry about, pass, touch"),
}
_IRREGULAR = (
    ("buys", "bought"),
    ("sells", "sold"),
    ("sees", "saw"),
    ("finds", "found"),
    ("writes", "wrote"),
    ("brings", "brought"),
    ("breaks", "broke"),
    ("takes", "took"),
    ("makes", "made"),
    ("knows", "knew"),
    ("draws", "drew"),
    ("keeps", "kept"),
)
_PEOPLE = {
    Split.TRAIN: words(
        "She, He, My brother, The teacher, The cook, Our neighbour, The boy, Anna, The old man"
    ),
    Split.HELD_OUT: words("My aunt, The doctor, Peter, The girl, The farmer"),
}
_NOUNS = {
    Split.TRAIN: words(
        "door, letter, car, house, box, picture, bicycle, table, shirt, garden, clock, boat, lamp, map, "
        "window, cup, chair, story, fence, list"
    ),
    Split.HELD_OUT: words("suitcase, ladder, bridge, jacket, piano, basket, radio, wall"),
}
_ENDS = ("", " in the morning", " with a friend", " very slowly", " at the station", " for the children")


def third_person(verb: str) -> str:
    """``carry`` → ``carries``."""
    first, _, rest = verb.partition(" ")
    if first.endswith(("s", "sh", "ch")):
        first += "es"
    else:
        first = first[:-1] + "ies" if first[-1] == "y" and first[-2] not in "aeiou" else first + "s"
    return f"{first} {rest}".strip()


def past(verb: str) -> str:
    """``carry`` → ``carried``, for regular verbs."""
    first, _, rest = verb.partition(" ")
    if first.endswith("e"):
        first += "d"
    else:
        first = first[:-1] + "ied" if first[-1] == "y" and first[-2] not in "aeiou" else first + "ed"
    return f"{first} {rest}".strip()


def _draw(rng: random.Random, split: Split) -> Item:
    if rng.random() < 0.6:
        verb = rng.choice(_REGULAR[split])
        forms = third_person(verb), past(verb)
    else:
        forms = rng.choice(_IRREGULAR)
    person, noun, end = rng.choice(_PEOPLE[split]), rng.choice(_NOUNS[split]), rng.choice(_ENDS)
    message, answer = (f"{person} {form} the {noun}{end}." for form in forms)
    return Item(message, answer)


PAST_TENSE = ExampleTask(
    name="past-tense",
    summary="Puts a sentence into the past tense.",
    data="People, verbs (regular and irregular), things and endings in one pattern. People, things and regular "
    "verbs of the held-out items are never trained on; the irregular verbs are.",
    instruction="Put this sentence into the past tense. Answer with the sentence only.\n\n{}",
    max_new_tokens=32,
    draw=_draw,
    is_right=same_text,
    adapter=LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj"), use_dora=True),
    num_train=640,
    demo="My aunt carries the suitcase with a friend.",
)
